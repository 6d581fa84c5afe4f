"""Builds ``fake_cuda.cpp``. Imports no torch, because the library works in full only where it is loaded first."""

import ctypes
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def library() -> Path:
    """The compiled library; built on first use, in a few seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch = Path(spec.origin).parent
    # The file's name carries all that went in, so another torch, or an edit, gets a library of its own.
    made = tempfile.gettempdir() + f"/fusedonemoe-fake-cuda-{os.getuid()}"
    Path(made).mkdir(exist_ok=True)
    stamp = f"{(torch / 'version.py').stat().st_mtime_ns:x}-{SOURCE.stat().st_mtime_ns:x}"
    target = Path(made) / f"{stamp}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=made) as folder:
            output = f"{folder}/fake_cuda.so"
            command = [os.environ.get("CXX", "c++"), "-O0", "-std=c++20", "-fPIC", "-shared", f"-I{torch}/include", str(SOURCE)]
            command += ["-o", output, f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            Path(output).replace(target)
    return target


def load() -> None:
    """Load the library into this process."""
    ctypes.CDLL(str(library()))
