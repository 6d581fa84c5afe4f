"""A program of C++ that runs a package of AOTInductor in a process without Python."""

import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

CPP = shutil.which("c++") or shutil.which("g++")

SOURCE = """
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <dlfcn.h>
#include <iostream>

// Arguments: the package, two sizes of a float32 input, which comes on stdin, and a library of CPU kernels or nothing.
int main(int argc, char** argv) {
  if (argc > 4) {
    void* kernels = dlopen(argv[4], RTLD_NOW);
    if (!kernels || reinterpret_cast<int (*)()>(dlsym(kernels, "fusedonemoe_load"))()) return 3;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor x = at::empty({std::stoll(argv[2]), std::stoll(argv[3])}, at::kFloat);
  std::cin.read(static_cast<char*>(x.data_ptr()), x.nbytes());
  for (const at::Tensor& y : model.run({x})) {
    std::cout.write(static_cast<const char*>(y.contiguous().data_ptr()), y.nbytes());
  }
}
"""


class Program:
    """The program, built in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run"
        torch_folder = Path(torch.__file__).parent
        (folder / "run.cpp").write_text(SOURCE)
        assert CPP is not None
        includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{torch_folder / 'lib'}"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = [CPP, "-std=c++20", "-O0", abi, *includes, "run.cpp", "-o", "run", *libraries]
        built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[-4000:]

    def run(self, package: str, x: Tensor, *kernels: Path) -> Tensor:
        """Return the float32 outputs, one behind the other."""
        T, D = x.shape
        command = [self.path, package, str(T), str(D), *kernels]
        ran = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32)
