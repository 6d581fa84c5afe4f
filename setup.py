"""Builds a wheel with the CPU kernels inside where FUSEDONEMOE_PREBUILD names instruction sets.

It is ``all``, or names as in ``ops/cpu/commands.py`` with commas between them, in an environment that has torch and a C++
compiler. Without it the wheel is for any machine, and the kernels are compiled on first use.
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PREBUILD = os.environ.get("FUSEDONEMOE_PREBUILD", "")


class BuildWithKernels(build_py):
    """Copies the package, and compiles the kernels into the copy."""

    def run(self) -> None:
        """Run the command."""
        super().run()
        if PREBUILD:
            spec = importlib.util.spec_from_file_location("commands", ROOT / "ops/cpu/commands.py")
            commands = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(commands)
            names = list(commands.VARIANTS) if PREBUILD == "all" else PREBUILD.split(",")
            folder = Path(self.build_lib, "fusedonemoe/ops/cpu/prebuilt").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                self._compile(commands, name, folder / f"kernels-{name}.so")

    def _compile(self, commands, name: str, library: Path) -> None:
        import torch

        compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
        _, flags = commands.VARIANTS[name]
        with tempfile.TemporaryDirectory() as objects:
            for step in commands.steps(compiler, flags, Path(torch.__file__).parent, str(library)):
                running = [subprocess.Popen(command, cwd=objects) for command in step]
                codes = [process.wait() for process in running]
                if any(codes):
                    raise SystemExit(f"the CPU kernels for {name} could not be compiled")
        subprocess.run(["strip", "--strip-unneeded", library], check=True)


class DistributionWithKernels(Distribution):
    """Says that a wheel with kernels has binaries, so that it is for one system."""

    def has_ext_modules(self) -> bool:
        """Return whether the wheel has binaries."""
        return bool(PREBUILD)


class PlatformWheel(bdist_wheel):
    """Names the system of a wheel with kernels; they link no Python, so it serves every version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PREBUILD else (python, abi, platform)


setup(distclass=DistributionWithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
