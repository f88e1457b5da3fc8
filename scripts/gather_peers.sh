#!/usr/bin/env bash
# For measuring on a GPU machine that has no vLLM and no network: gathers peers, unmodified, in a directory that can be
# taken there and put on PYTHONPATH. For Python 3.12 and an H100 or H200 with CUDA 13.
# usage: scripts/gather_peers.sh DIR [PEER ...]
#
#   vllm          sampling of both model runners; vllm_without_engine.py stands for what else it imports
#   liger         the whole package (pure Python)
#   speculators   its fused losses, under empty package files
#   flashinfer    its sampling, under an empty package file; its CUDA kernels, compiled here by the nvcc of CUDA_HOME
#                 or PATH in some minutes; and what loads them
set -euo pipefail
directory=$(realpath -m "$1")
peers=("${@:2}")
[ ${#peers[@]} -gt 0 ] || peers=(vllm liger speculators flashinfer)
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

version() { # NAME, as installed in .venv
  "$python" -c "import importlib.metadata; print(importlib.metadata.version('$1'))"
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

gather_flashinfer() {
  # tvm_ffi loads the kernels: of the same version as .venv's, with whose headers they are compiled.
  unpack flashinfer-python==0.7.2.post1 nvidia-ml-py==13.615.71 apache-tvm-ffi=="$(version apache-tvm-ffi)"
  : > flashinfer/__init__.py # it would import all other kernels
  take flashinfer/{__init__,sampling,utils,api_logging,artifacts,compilation_context,version,_build_meta}.py \
    flashinfer/{jit,trace} flashinfer_python-*.dist-info/METADATA pynvml.py \
    tvm_ffi/{*.py,*.so,*/*.py,lib/*.so} apache_tvm_ffi-*.dist-info/METADATA
  compile_sampling
  # FlashInfer looks here for what was compiled ahead.
  install -D .cache/flashinfer/*/90a/cached_ops/sampling/sampling.so \
    "$directory/flashinfer/data/aot/sampling/sampling.so"
}

compile_sampling() { # as FlashInfer compiles it at first use
  unpack nvidia-curand==10.4.0.35 # headers, which not every CUDA toolkit has
  # The linker wants a driver, which the kernels do not call.
  c++ -shared -Wl,-soname,libcuda.so.1 -x c /dev/null -o libcuda.so
  mkdir path && ln -s ../flashinfer path/ # without tvm_ffi, which is for another Python than .venv's
  PYTHONPATH=$PWD/path FLASHINFER_WORKSPACE_BASE=$PWD FLASHINFER_CUDA_ARCH_LIST=9.0a \
    FLASHINFER_EXTRA_CUDAFLAGS="-isystem $PWD/nvidia/cu13/include" FLASHINFER_EXTRA_LDFLAGS="-L$PWD" \
    PATH=$root/.venv/bin:$PATH "$python" -P -c '
from flashinfer.jit.sampling import gen_sampling_module
gen_sampling_module().build()'
}

for peer in "${peers[@]}"; do "gather_$peer"; done
du -sh "$directory"
