#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs each into a clean environment, and runs a layer far from the checkout.
# Usage: tests/smoke_wheel.sh [PYTHON], with a Python that has build, twine and auditwheel.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${1:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "wheel smoke: $*" >&2
  exit 1
}

cd "$work"
# Without isolation: the pinned setuptools of the calling environment, and no second download.
"$python" -m build --no-isolation --outdir dist "$root" >build.log 2>&1 || { cat build.log; fail "build failed"; }
"$python" -m twine check --strict dist/*

mkdir unpacked
tar -xzf dist/*.tar.gz -C unpacked --strip-components=1
for path in ops/__init__.py fusedonemoe/py.typed tests/repo/test_layout.py docs/conf.py examples/own_model.py LICENSE constraints.txt; do
  [ -e "unpacked/$path" ] || fail "the sdist lacks $path"
done
[ ! -e unpacked/fusedonemoe/ops ] || fail "the sdist carries the link's target a second time"

"$python" -m zipfile -l dist/*.whl >wheel.list
for path in fusedonemoe/ops/__init__.py fusedonemoe/ops/cpu/native/moe.cpp fusedonemoe/py.typed; do
  grep -q "^$path " wheel.list || fail "the wheel lacks $path"
done
! sed '1d; s/ .*//' wheel.list | grep -Ev '^(fusedonemoe/.*\.py|fusedonemoe/py\.typed|fusedonemoe/ops/cpu/native/[^/]+|fusedonemoe-[^/]+\.dist-info/.*)$' ||
  fail "the wheel carries more than the package"

cat >smoke.py <<'PY'
import sysconfig
from pathlib import Path

import torch

import fusedonemoe
import fusedonemoe.ops

site_packages = Path(sysconfig.get_path("purelib"))
for module in (fusedonemoe, fusedonemoe.ops):
    assert Path(module.__file__).is_relative_to(site_packages), module.__file__

layer = fusedonemoe.MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
x = torch.randn(3, 5, 16, requires_grad=True)
y = layer(x)
assert y.shape == x.shape and y.isfinite().all() and y.abs().sum() > 0
y.square().sum().backward()
for name, tensor in [("x", x), *layer.named_parameters()]:
    assert tensor.grad is not None and tensor.grad.isfinite().all(), name
assert x.grad.abs().sum() > 0
PY

"$python" -m venv clean
pip=(clean/bin/python -m pip -qq)
# The wheel alone, with no extra: what it needs beyond torch and numpy must not creep in.
"${pip[@]}" install -c "$root/constraints.txt" dist/*.whl
clean/bin/python -I smoke.py
clean/bin/fusedonemoe --help >/dev/null
echo "wheel smoke: the wheel runs"

"${pip[@]}" install -c "$root/constraints.txt" setuptools wheel
"${pip[@]}" install --no-deps --no-build-isolation --force-reinstall ./unpacked
clean/bin/python -I smoke.py
echo "wheel smoke: the sdist runs"

# A wheel for one system, with the kernels inside: of one instruction set, which every machine of today has.
if [ "$(uname -sm)" = "Linux x86_64" ]; then
  FUSEDONEMOE_PREBUILD=x86-64-v3 "$python" -m build --wheel --no-isolation --outdir prebuilt unpacked >build.log 2>&1 ||
    { cat build.log; fail "the wheel with kernels could not be built"; }
  "$python" -m twine check --strict prebuilt/*
  PATH="$(dirname "$python"):$PATH" auditwheel repair --exclude libtorch_cpu.so --wheel-dir many \
    prebuilt/fusedonemoe-*-py3-none-linux_x86_64.whl >repair.log 2>&1 || { cat repair.log; fail "auditwheel"; }
  "${pip[@]}" install --no-deps --force-reinstall many/fusedonemoe-*-py3-none-manylinux_*_x86_64.whl
  cat >kernels.py <<'PY'
import shutil
import torch
from fusedonemoe import MoE
from fusedonemoe.ops.cpu import build

assert shutil.which("g++") is None
assert build.load()._name.endswith("/ops/cpu/prebuilt/kernels-x86-64-v3.so"), build.load()._name
layer = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2, impl="cpu")
x = torch.randn(3, 16, requires_grad=True)
y = layer(x)
y.sum().backward()
assert y.isfinite().all() and y.abs().sum() > 0 and x.grad.abs().sum() > 0
PY
  python3=$PWD/clean/bin/python
  env -i PATH=/nowhere FUSEDONEMOE_CPU_ARCH=x86-64-v3 "$python3" -I kernels.py
  env -i PATH=/nowhere FUSEDONEMOE_CPU_ARCH=x86-64-v3 "$python3" -I -m fusedonemoe doctor >doctor.log || { cat doctor.log; fail "doctor"; }
  grep -q 'CPU kernels .*kernels-x86-64-v3.so' doctor.log || { cat doctor.log; fail "doctor does not name the kernels"; }
  echo "wheel smoke: the wheel with kernels runs without a compiler"
fi
