"""README and docs: Python blocks run, commands exist, links lead somewhere, and every public name has an entry."""

import pkgutil
import re
import subprocess
import sys
import types
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fusedonemoe
from fusedonemoe import export, functional, ops, testing
from fusedonemoe.integrations import checkpoints, transformers

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.relative_to(DOCS).parts),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


class Fence(NamedTuple):
    """A fenced block: what stands after the opening fence, its first line's number, and its text."""

    language: str
    line: int
    text: str


def fences(page: Path) -> list[Fence]:
    found, language, start = [], None, 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if language is None:
            language, start = line[3:].strip(), number + 1
        else:
            found.append(Fence(language, start, "\n".join(lines[start - 1 : number - 1]) + "\n"))
            language = None
    assert language is None, f"{page.name}:{start - 1} opens a block that nothing closes"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[Fence]:
    return [fence for fence in fences(page) if fence.language == "python"]


@pytest.mark.parametrize("page", list(filter(python_blocks, PAGES)), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = types.ModuleType("page").__dict__
    with torch.random.fork_rng():
        for block in python_blocks(page):
            assert ">>>" not in block.text, f"{page.name}:{block.line}: a session belongs into a pycon block, which doctest runs"
            # Blank lines in front, so that a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


@each_page
def test_sessions_end_with_a_blank_line(page):
    # doctest reads to the next blank line, and would take the closing fence for expected output.
    for fence in fences(page):
        assert (fence.language == "pycon") == (">>>" in fence.text), f"{page.name}:{fence.line}"
        assert fence.language != "pycon" or fence.text.endswith("\n\n"), f"{page.name}:{fence.line}"


def shell_lines(page: Path) -> list[str]:
    """Every command that a page prints: the lines of sh blocks, and code in the text that starts like a command."""
    lines = [line for fence in fences(page) if fence.language == "sh" for line in fence.text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    return [line.split("#")[0].strip() for line in lines]


@cache
def command_help(subcommand: str) -> str:
    command = [sys.executable, "-m", "fusedonemoe", subcommand, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, f"{' '.join(command)}: {run.stderr}"
    return run.stdout


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@each_page
def test_make_targets_exist(page):
    for line in shell_lines(page):
        if match := re.fullmatch(r"make((?: [a-z-]+)*)", line):
            assert set(match[1].split()) <= make_targets(), line


@each_page
def test_subcommands_exist(page):
    for line in shell_lines(page):
        # `python -m fusedonemoe demo | bench` lists several.
        if match := re.match(r"\S*python -m fusedonemoe +(.*)", line):
            for part in match[1].split("|"):
                subcommand, *arguments = part.split()
                text = command_help(subcommand)
                for argument in arguments:
                    assert not argument.startswith("-") or argument.split("=")[0] in text, line


def test_the_readme_opens_with_the_two_commands():
    first = next(fence for fence in fences(ROOT / "README.md"))
    assert [line.split("#")[0].strip() for line in first.text.splitlines()] == ["make demo", "make test"]


@each_page
def test_paths_in_commands_exist(page):
    for line in shell_lines(page):
        for path in re.findall(r"(?<!\S)(?:tests|asv_bench|ops|fusedonemoe|docs|examples)/[\w./-]*", line):
            assert path.startswith("docs/_build") or (ROOT / path.rstrip("/")).exists(), f"{page.name} names {path}"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and MyST write them in links."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT), f"{page.name} links to {target}, outside the repository"
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}: no such heading"


def entries() -> set[str]:
    """What the reference pages describe. The build fails on an entry that does not exist; here the reverse is checked."""
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", text, flags=re.MULTILINE))


MODULES = [fusedonemoe, export, functional, testing, ops, checkpoints, transformers]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_an_entry(module):
    # The operators' package re-exports objects that stand under another name; a module has a page and no entry.
    described = [pkgutil.resolve_name(entry) for entry in sorted(entries())]
    for name in module.__all__:
        thing = getattr(module, name)
        assert isinstance(thing, types.ModuleType) or any(thing is other for other in described), name


def test_every_registered_operator_is_listed():
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("fusedonemoe::") for name in names if name.startswith("fusedonemoe::")}
    page = DOCS / "api" / "operators.md"
    listed = [fence.language.removeprefix("{operator} ") for fence in fences(page) if fence.language.startswith("{operator}")]
    assert len(listed) == len(set(listed))
    assert registered == set(listed)


def test_pages_promise_no_network():
    # The pages must read the same without one: no scripts, styles, fonts or pictures from elsewhere.
    conf = (DOCS / "conf.py").read_text(encoding="utf-8")
    assert not re.search(r"https?://|intersphinx_mapping|mathjax", conf)
    for page in PAGES:
        assert not re.search(r"!\[[^]]*\]\(https?:", page.read_text(encoding="utf-8")), page.name
