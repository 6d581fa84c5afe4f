"""Machine code of the Triton kernels: needs triton, and a process that compiles rather than interprets."""

import importlib.util
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def reports(pytestconfig, tmp_path_factory):
    """The folder in which reports on machine code are kept from run to run; their names say all that they depend on."""
    cache = getattr(pytestconfig, "cache", None)  # -p no:cacheprovider leaves none
    return tmp_path_factory.mktemp("triton_machine_code") if cache is None else cache.mkdir("triton_machine_code")
