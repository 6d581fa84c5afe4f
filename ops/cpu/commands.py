"""The commands that compile the CPU kernels, for this machine on first use or for the machines of a wheel.

It imports nothing of this package, so that the build of a wheel can read it alone.
"""

from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# -ffp-contract=fast rounds a * b + c once in every loop; without it a sum could round differently in a vector and in a scalar
# tail.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
ELEMENTS = ("f32", "bf16", "f16")  # each compiled by itself
# The oldest torch whose stable interface the operators use: a library that is compiled with any torch serves all of them.
STABLE_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# The instruction sets of a wheel, from the least: the features that a CPU must have, as Linux names them, and gcc's options.
_V2 = frozenset({"sse4_1", "sse4_2", "ssse3", "popcnt", "cx16"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VARIANTS = {
    "x86-64-v2": (_V2, ["-march=x86-64-v2"]),
    "x86-64-v3": (_V3, ["-march=x86-64-v3"]),
    "x86-64-v4": (_V4, ["-march=x86-64-v4"]),
    "x86-64-v4-bf16": (_V4 | {"avx512_bf16", "avx512_vnni"}, ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"]),
}


def steps(compiler: str, flags: list[str], torch_folder: Path, output: str) -> list[list[list[str]]]:
    """Return the commands to run, in a folder for objects: those of a step can run at once, each ends with what it makes.

    Args:
        compiler: the C++ compiler.
        flags: besides :data:`FLAGS`.
        torch_folder: the folder of the package torch, with its headers and libraries.
        output: the file name of the library.
    """
    compile_with = [compiler, *FLAGS, *flags]
    source, objects = str(SOURCES / "moe.cpp"), [f"{element}.o" for element in ELEMENTS]
    objects_of = [
        [*compile_with, f"-DELEMENT={element}", *(["-DCOMMON"] if element == ELEMENTS[0] else []), "-c", source, "-o", made]
        for element, made in zip(ELEMENTS, objects, strict=True)
    ]
    headers = [STABLE_TORCH, "-isystem", str(torch_folder / "include")]
    objects_of.append([*compile_with, *headers, "-c", str(SOURCES / "operators.cpp"), "-o", "operators.o"])
    # torch and its OpenMP are in the process already: the library names torch, and has no path to either.
    torch_libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    # At most two compilers at a time: each takes much memory.
    return [
        objects_of[:2],
        objects_of[2:],
        [[compiler, *flags, "-shared", *objects, "operators.o", *torch_libraries, "-o", output]],
    ]
