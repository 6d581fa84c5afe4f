"""Values of the Triton kernels, on a GPU or in Triton's interpreter.

A process either interprets kernels or compiles them: TRITON_INTERPRET must be set before triton is imported. So these tests
run in a process of their own, ``make triton-values``; on a machine with CUDA an ordinary ``pytest -m gpu`` runs them too.
"""

import importlib.util
import os
import zlib

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

if not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    from tests.triton.values import interpreter_bf16, interpreter_checks

    interpreter_bf16.install()
    interpreter_checks.install()


def pytest_itemcollected(item):
    if not INTERPRETED:
        item.add_marker(pytest.mark.gpu)
    # What the fixture below turns on also warns of every CUDA operator that has no deterministic form.
    item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))
    # NumPy's remarks on infinities, which some tests put in.
    item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))


@pytest.fixture(scope="session")
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _programs_in_random_order(request):
    if INTERPRETED:
        interpreter_checks.shuffle(seed=zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _unwritten_memory_shows():
    """torch.empty holds NaN, or the largest integer, so that an element which no program writes is not right by luck."""
    assert torch._C._get_deterministic_fill_uninitialized_memory()  # torch's default, in force in the mode below
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(mode)
