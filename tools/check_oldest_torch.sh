#!/usr/bin/env bash
# Compile the op libraries against the headers of the oldest torch supported, and resolve every
# symbol of theirs against its libraries. The stable ABI's target version does not guard what is in
# headers alone, so that a newer torch accepts code which the oldest refuses.
#
#     tools/check_oldest_torch.sh [WHEEL]
#
# WHEEL is a torch 2.11.0 wheel with CUDA (pip downloads one otherwise). About 2 GB of disk.
set -euo pipefail
cd "$(dirname "$0")/.."
version=2.11.0
python=${PYTHON:-python3}
cache=.cache/oldest-torch
mkdir -p "$cache"
wheel=${1:-}
if [ -z "$wheel" ]; then
    wheel=$(find "$cache" -name "torch-$version*.whl" -print -quit)
    if [ -z "$wheel" ]; then
        "$python" -m pip download --quiet --no-deps --dest "$cache" "torch==$version"
        wheel=$(find "$cache" -name "torch-$version*.whl" -print -quit)
    fi
fi
if [ ! -e "$cache/unpacked" ] || [ "$wheel" -nt "$cache/unpacked" ]; then
    rm -rf "$cache/torch" "$cache/build"
    "$python" - "$wheel" "$cache" <<'PYTHON'
import fnmatch
import sys
import zipfile

wanted = ["torch/include/*", "torch/version.py"]
wanted += [f"torch/lib/lib{name}.so" for name in ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")]
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = [n for n in wheel.namelist() if any(fnmatch.fnmatch(n, w) for w in wanted)]
    wheel.extractall(sys.argv[2], names)
PYTHON
    touch "$cache/unpacked"
fi
"$python" tools/native_build.py --resolve-against "$cache/torch"
echo "the op libraries compile and link against torch $version"
