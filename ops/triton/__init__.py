"""The GPU lowering: Triton kernels, one file per operator. The files need triton and are imported on first use."""

import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads this when it is imported; in its interpreter the kernels run on CPU tensors, slowly, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(dtype: torch.dtype, device_type: str) -> str | None:
    """Return why the Triton kernels cannot run on such tensors; None when they can."""
    if not INSTALLED:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"the Triton kernels have no {str(dtype).removeprefix('torch.')}"
    if device_type != ("cpu" if INTERPRETED else "cuda"):
        return f"the Triton kernels do not run on device {device_type!r}"
    return None
