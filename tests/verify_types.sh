#!/usr/bin/env bash
# Installs the wheel into a folder of its own and has pyright count which public names have a known type: all of them must.
# Usage: tests/verify_types.sh [PYTHON], with a Python that has build, pyright, torch and triton.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${1:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! "$python" -c 'import triton' 2>/dev/null; then
  echo "verify types: triton is not installed (it has wheels for Linux alone), and its kernels would count as unknown: left out"
  exit 0
fi

cd "$work"
# The wheel by way of the sdist, as it is released: pyright does not follow the hooks of an editable install.
"$python" -m build --no-isolation --outdir dist "$root" >build.log 2>&1 || { cat build.log; exit 1; }
"$python" -m pip -qq install --no-deps --target site dist/*.whl

# pyright asks the `python` of PATH where modules are. Its node is the one from PyPI, whatever else the machine has.
mkdir here
cd here
export PATH=${python%/*}:$PATH PYTHONPATH=$work/site PYRIGHT_PYTHON_GLOBAL_NODE=0 PYRIGHT_PYTHON_IGNORE_WARNINGS=1
# The status decides, not the rounded percentage: it is 0 only where every name is known.
if ! "$python" -m pyright --verifytypes fusedonemoe --ignoreexternal >"$work/types.txt"; then
  sed -n '/^Symbols used in public interface/,$p' "$work/types.txt"
  exit 1
fi
grep -E 'With known type|completeness' "$work/types.txt" | head -1
grep -q 'py.typed file: "'"$work"'/site/' "$work/types.txt"
grep 'Type completeness score: 100%' "$work/types.txt"
