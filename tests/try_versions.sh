#!/usr/bin/env bash
# Tries other versions: a clean environment with one torch under one Python, in which a cut of the tests runs. It takes values,
# gradients, operators, autocast, compilation, export, adapters, quantised experts and transformers' models.
# Usage: tests/try_versions.sh TORCH [PYTHON [PYTEST ARGUMENT ...]], as in `tests/try_versions.sh 2.11.0 python3.13 -n 2`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch=${1:?which torch, as in 2.11.0}
interpreter=${2:-python3}
shift $(($# < 2 ? $# : 2))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$interpreter" -m venv "$work/venv"
python=$work/venv/bin/python
# What hangs on the versions of torch and Python is left to pip; everything else is as pinned.
grep -vE '^(#|(torch|triton|numpy|setuptools|onnx|onnxruntime)==)' "$root/constraints.txt" >"$work/constraints.txt"
"$python" -m pip -qq install -c "$work/constraints.txt" "torch==$torch" "$root[test]"
"$python" - <<'PY'
import importlib.metadata
import platform

import torch

triton = [d.version for d in importlib.metadata.distributions() if d.metadata["Name"] == "triton"]
print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton[0] if triton else 'absent'}", flush=True)
PY

cd "$root"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 XDG_CACHE_HOME=$work/cache TORCHINDUCTOR_CACHE_DIR=$work/inductor
"$python" -m pytest -q -p no:cacheprovider -m "not slow and not recompiles" "$@" \
  tests/layers/test_{layers,loss_free_balance,product_key_router,export,traced,one_operator}.py \
  tests/ops/test_{experts_mlp_gradients,cpu_operators,neurons,quantized,lora,autocast,compile,portable}.py \
  tests/integrations/test_{transformers_experts,training_integrations}.py
