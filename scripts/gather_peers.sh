#!/usr/bin/env bash
# For measuring on a GPU machine that has no vLLM and no network: gathers peers, unmodified, in a directory that can be
# taken there and put on PYTHONPATH. For Python 3.12.
# usage: scripts/gather_peers.sh DIR [PEER ...]
#
#   vllm          sampling of both model runners; vllm_without_engine.py stands for what else it imports
#   liger         the whole package (pure Python)
#   speculators   its fused losses, under empty package files
set -euo pipefail
directory=$(realpath -m "$1")
peers=("${@:2}")
[ ${#peers[@]} -gt 0 ] || peers=(vllm liger speculators)
root=$(realpath "$(dirname "$0")/..")
python=$root/.venv/bin/python
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
mkdir -p "$directory"
cd "$unpacked"

unpack() { # WHEEL==VERSION ...
  "$python" -m pip install --quiet --no-deps --no-compile --only-binary :all: --target . --upgrade \
    --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 "$@"
}

take() { # FILE ..., with the folders above them
  cp -r --parents --target-directory "$directory" "$@"
}

gather_vllm() {
  cd "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  take vllm/v1/worker/gpu/sample/{gumbel,watermark}.py vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py \
    vllm/v1/watermarking/prfs/{philox,base}.py \
    vllm/v1/sample/{sampler,rejection_sampler,metadata}.py vllm/v1/sample/ops/topk_topp_{sampler,triton}.py \
    vllm/v1/sample/logits_processor/{__init__,builtin,interface,state}.py vllm/v1/outputs.py \
    vllm/v1/spec_decode/{llm_base_proposer,metadata,utils}.py \
    vllm/model_executor/warmup/jit_warmup{,_triton_helper}.py vllm-*.dist-info/METADATA
  cd - >/dev/null
  find "$directory/vllm" -type d -exec touch {}/__init__.py \;
  cp "$root/scripts/vllm_without_engine.py" "$directory/vllm/__init__.py"
}

gather_liger() {
  unpack liger-kernel==0.8.5
  take liger_kernel liger_kernel-*.dist-info/METADATA
}

gather_speculators() {
  unpack speculators==0.9.0
  take speculators/losses/fused.py speculators/utils/util.py speculators-*.dist-info/METADATA
  touch "$directory"/speculators/{,losses/,utils/}__init__.py
}

for peer in "${peers[@]}"; do "gather_$peer"; done
du -sh "$directory"
