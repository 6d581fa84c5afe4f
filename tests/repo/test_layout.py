"""The shape of the repository: the link, the package list, the import guard, and arrows that point downwards."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fusedonemoe

ROOT = Path(__file__).resolve().parents[2]
LINK = ROOT / "fusedonemoe" / "ops"
PACKAGE_ROOTS = {"fusedonemoe": ROOT / "fusedonemoe", "fusedonemoe.ops": ROOT / "ops"}

# Floors from the ground up. A name stands for the module and, when it is a package, for everything inside it.
# A module imports from its own floor and from those below.
FLOORS = [
    [
        "files",
        "ops.reference",
        "ops.plan",
        "ops.activation",
        "ops.route",
        "ops.product_keys",
        "ops.notice",
        "ops.derivatives",
        "ops.operands",
        "ops.precision",
        "ops.records",
        "ops.exporting",
        "ops.options",
        "ops.rules",
        "ops.values",
        "ops.formats",
        *("ops.cpu.native", "ops.cpu.build", "ops.cpu.cache", "ops.cpu.commands", "ops.cpu.compiler", "ops.cpu.forks"),
    ],
    ["ops.dense", "ops.grouped", "ops.mlp", "ops.neurons", "ops.cpu", "ops.cuda", "ops.triton", "ops.portable"],
    ["ops.library", "ops.choice", "ops"],
    ["checks", "linear", "agreement"],
    ["functional", "config", "hf"],
    [
        "balance",
        "layers",
    ],
    [
        "compat",
        "integrations",
        "explanation",
        "export",
        "tuning",
        "bench",
        "report",
        "cli",
        "testing",
        "__main__",
        "",
    ],
]
FLOOR_OF = {f"fusedonemoe.{name}".rstrip("."): floor for floor, names in enumerate(FLOORS) for name in names}
KERNEL_PACKAGES = [f"fusedonemoe.{name}" for name in FLOORS[1]]
ORACLE = "fusedonemoe.ops.reference"
# A prefix covers a package's inside, except for these two: what stands inside them has floors of its own.
STOREYS = ("fusedonemoe", "fusedonemoe.ops")


def source_files() -> dict[str, Path]:
    """Every module of the library by import name."""
    modules = {}
    for prefix, folder in PACKAGE_ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            if LINK in path.parents:  # reached through the link; counted at ops/
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return modules


MODULES = source_files()


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_kernel(module: str) -> bool:
    return any(is_inside(module, package) for package in KERNEL_PACKAGES)


def floor_of(module: str) -> int:
    if module in FLOOR_OF:
        return FLOOR_OF[module]
    package = module.rpartition(".")[0]
    if package in STOREYS:
        raise AssertionError(f"{module} has no floor yet: give it one in FLOORS")
    return floor_of(package)


def imports(tree: ast.AST, module: str, modules: dict[str, Path]) -> list[tuple[int, str]]:
    """The library's own modules that a syntax tree imports, at any depth, as (line, module)."""
    package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            # `from package import name` is an arrow to the submodule where there is one.
            names = [sub if (sub := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        found += [(node.lineno, name) for name in names if is_inside(name, "fusedonemoe")]
    return found


ARROWS = [
    (module, line, target)
    for module, path in MODULES.items()
    for line, target in imports(ast.parse(path.read_text(encoding="utf-8")), module, MODULES)
]


def offending(rule) -> list[str]:
    return [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}" for module, line, target in ARROWS if rule(module, target)
    ]


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="an sdist carries no link, and needs none")
def test_link_is_relative_and_leads_to_ops():
    assert LINK.is_symlink()
    assert os.readlink(LINK) == os.path.join("..", "ops")
    assert LINK.resolve() == ROOT / "ops"


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {module if path.name == "__init__.py" else module.rpartition(".")[0] for module, path in MODULES.items()}
    assert sorted(listed) == sorted(folders)
    assert not [folder for folder in folders if folder not in MODULES], "a package folder has no __init__.py"


def test_top_level_ops_is_refused():
    run = subprocess.run([sys.executable, "-c", "import ops"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode != 0
    last_line = run.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert "import fusedonemoe.ops" in last_line


def test_version_is_the_installed_one():
    installed = importlib.metadata.version("fusedonemoe")
    assert fusedonemoe.__version__ == installed, "the installation is older than the source: pip install -e . again"


def test_every_module_has_a_floor():
    for module in MODULES:
        floor_of(module)


def test_arrows_point_downwards():
    assert offending(lambda module, target: floor_of(target) > floor_of(module)) == []


def test_no_kernel_imports_the_oracle():
    assert offending(lambda module, target: is_inside(target, ORACLE) and is_kernel(module)) == []


def test_no_layer_imports_a_kernel():
    layers = floor_of("fusedonemoe.layers")
    assert offending(lambda module, target: is_kernel(target) and floor_of(module) == layers) == []


@pytest.mark.parametrize(
    ("module", "statement", "target"),
    [
        ("fusedonemoe.ops.plan", "import fusedonemoe.ops.library", "fusedonemoe.ops.library"),
        ("fusedonemoe.ops.plan", "from fusedonemoe.ops import library", "fusedonemoe.ops.library"),
        ("fusedonemoe.ops.plan", "from fusedonemoe.ops.library import grouped", "fusedonemoe.ops.library"),
        ("fusedonemoe.ops.plan", "from . import library", "fusedonemoe.ops.library"),
        ("fusedonemoe.ops.plan", "from ..functional import moe", "fusedonemoe.functional"),
        ("fusedonemoe.ops", "from . import library", "fusedonemoe.ops.library"),
        ("fusedonemoe.ops.plan", "def f():\n    from fusedonemoe import functional as F", "fusedonemoe.functional"),
        ("fusedonemoe.ops.plan", "from fusedonemoe import __version__", "fusedonemoe"),
    ],
)
def test_every_form_of_import_is_an_arrow(module, statement, target):
    # Without this, an arrow that the walk cannot see would pass for an arrow that is not there.
    modules = {
        "fusedonemoe.functional": Path("functional.py"),
        "fusedonemoe.ops": Path("__init__.py"),
        "fusedonemoe.ops.library": Path("library.py"),
        "fusedonemoe.ops.plan": Path("plan.py"),
    }
    assert [name for _, name in imports(ast.parse(statement), module, modules)] == [target]


@pytest.mark.parametrize("triton", ["here or not", "not installed"])
def test_the_import_is_silent_and_leaves_compilers_alone(triton):
    # None in sys.modules is what Python takes for "not installed". The compilers' own imports take as long as all of torch's.
    hide = "sys.modules['triton'] = None; " if triton == "not installed" else ""
    compilers = "{'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)"
    code = f"import sys; {hide}import torch; before = {compilers}; import fusedonemoe; assert {compilers} == before"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
