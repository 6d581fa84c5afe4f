"""Values of the Triton kernels: on a GPU where there is one, otherwise in Triton's interpreter (TRITON_INTERPRET=1)."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter_bf16  # noqa: F401
    import interpreter_checks  # noqa: F401


@pytest.fixture(scope="session")
def device():
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
