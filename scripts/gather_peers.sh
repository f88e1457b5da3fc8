#!/usr/bin/env bash
# For measuring on a GPU machine that has no vLLM and no network: gathers peers, unmodified, in a directory that can be
# taken there and put on PYTHONPATH. usage: scripts/gather_peers.sh DIR
#
#   vllm           the modules of model runner V2's sampling, under package files that import nothing else
#   liger_kernel   the whole package (pure Python)
#   speculators    its fused losses, under empty package files
set -euo pipefail
directory=$(realpath -m "$1")
cd "$(dirname "$0")/.."
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

for file in v1/worker/gpu/sample/{gumbel,watermark}.py v1/worker/gpu/spec_decode/rejection_sampler_utils.py \
  v1/watermarking/prfs/{philox,base}.py; do
  install -D "$site/vllm/$file" "$directory/vllm/$file"
done
mkdir -p "$directory/vllm/triton_utils"
cat > "$directory/vllm/triton_utils/__init__.py" <<'END'
import triton
import triton.language as tl
import triton.language.extra.libdevice as tldevice

HAS_TRITON = True
END
find "$directory/vllm" -type d -exec touch {}/__init__.py \;
for info in "$site"/vllm-*.dist-info; do install -D "$info/METADATA" "$directory/$(basename "$info")/METADATA"; done

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
.venv/bin/python -m pip download --quiet --no-deps --dest "$wheels" liger-kernel==0.8.5 speculators==0.9.0
.venv/bin/python - "$wheels" "$directory" <<'END'
import sys
from pathlib import Path
from zipfile import ZipFile

wheels, directory = map(Path, sys.argv[1:])
for wheel in wheels.glob("*.whl"):
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        if wheel.name.startswith("speculators"):
            wanted = ("speculators/losses/fused.py", "speculators/utils/util.py")
            names = [name for name in names if name in wanted or name.endswith("/METADATA")]
        archive.extractall(directory, names)
END
for package in speculators speculators/losses speculators/utils; do touch "$directory/$package/__init__.py"; done
du -sh "$directory"
