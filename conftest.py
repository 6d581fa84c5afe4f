"""Collection rules for the whole repository."""

import gc
import importlib.util
import os

import pytest
from hypothesis import settings

# ops/ is collected as fusedonemoe/ops: under its own name its guard raises.
collect_ignore = ["ops"]
if importlib.util.find_spec("triton") is None:
    # Doctest collection imports every module, and these import triton at the top.
    collect_ignore.append("fusedonemoe/ops/triton")

# Or every process that compiles a graph would find out, for 5 s, by compiling trials and importing torch once more for each.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# No deadline: the first example pays for compilation. In CI the same examples every time.
settings.register_profile("repository", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("repository")


@pytest.fixture
def packed_uses():
    """One entry for each forward that read packed weights so far."""
    from tests.interception import intercepted  # here, so that collection does not wait for torch

    seen: list[None] = []

    def counted(kernel):
        seen.append(None)
        return kernel

    with intercepted("experts_mlp_packed_cpu", counted):
        yield seen


@pytest.fixture
def small_thresholds():
    """Let the CPU kernels use their threads and their pool for work of any size."""
    import ctypes

    from fusedonemoe.ops.cpu import build

    library = build.load()
    kept = [
        (ctypes.c_double.in_dll(library, "fusedonemoe_products_per_thread"), 1.0),
        (ctypes.c_double.in_dll(library, "fusedonemoe_keys_per_thread"), 1.0),
        (ctypes.c_int64.in_dll(library, "fusedonemoe_pooled_from"), 1),
    ]
    before = [value.value for value, _ in kept]
    for value, small in kept:
        value.value = small
    yield
    for (value, _), old in zip(kept, before, strict=True):
        value.value = old


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What stands when a file's tests begin is left out of garbage collections, most of which would look at torch's modules."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # here, so that collecting CPU tests does not wait for it

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
