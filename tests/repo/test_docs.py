"""README and docs: Python blocks run, commands exist, links lead somewhere, and every public name has an entry."""

import argparse
import contextlib
import importlib
import io
import pkgutil
import re
import types
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest
import torch

import fusedonemoe
from fusedonemoe import cli, compat
from fusedonemoe.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
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
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
        main([subcommand, "--help"])
    assert stopped.value.code == 0
    return out.getvalue()


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


def test_every_named_test_exists():
    # A promise names the test that holds it.
    named = {pair for page in PAGES for pair in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))}
    assert len(named) > 50, "docs/numerics.md names a test for each promise"
    for path, name in sorted(named):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, flags=re.MULTILINE), f"{path} has no {name}"


def test_every_promise_names_a_test():
    promised, _, rest = prose(DOCS / "numerics.md").partition("## What is not promised")
    promises = re.findall(r"^- .*(?:\n  .*)*", promised, flags=re.MULTILINE)
    notes = dict(re.findall(r"^\[\^([\w-]+)\]: (.*)$", rest, flags=re.MULTILINE))
    assert len(promises) > 30
    for promise in promises:
        (note,) = re.findall(r"\[\^([\w-]+)\]$", promise)
        assert "::" in notes.pop(note), promise
    assert not notes


SVG = "{http://www.w3.org/2000/svg}"


def test_diagrams_can_be_read_by_those_who_do_not_see_them():
    ids: set[str] = set()
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in sorted((DOCS / "diagrams").glob("*.svg")):
        assert f":file: diagrams/{path.name}\n" in pages, f"no page shows {path.name}"
        root = ET.parse(path).getroot()
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None and title.text and description is not None and description.text
        assert root.get("role") == "img" and root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        own = [name for node in root.iter() if (name := node.get("id"))]
        assert not ids & set(own) and len(own) == len(set(own)), f"{path.name}: pages hold several diagrams, so ids are unique"
        ids |= set(own)
        # One unit is a pixel on a telephone, and colours are the theme's.
        assert root.get("viewBox", "").startswith("0 0 360 ")
        assert not any(node.get("fill") or node.get("style") for node in root.iter())


def test_the_plan_is_drawn_as_it_is():
    experts = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    order, offsets = fusedonemoe.functional.plan(experts, 3)
    root = ET.parse(DOCS / "diagrams" / "plan.svg").getroot()
    rows = ["".join(f"{text.text} " for text in group) for group in root.iter(f"{SVG}g") if group.get("class") == "code"]
    expected = [range(8), [f"e{e}" for e in experts.flatten()], [f"e{e}: {c}" for e, c in enumerate(offsets.diff())]]
    assert rows == ["".join(f"{item} " for item in line) for line in (*expected, offsets.tolist(), order.tolist())]


def test_the_command_line_is_described():
    page = (DOCS / "api" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| (.+) \|$", page, flags=re.MULTILINE) == list(COMMANDS.items())
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", page, flags=re.MULTILINE | re.DOTALL))
    assert sections.keys() == COMMANDS.keys()
    for name, section in sections.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(cli.MODULES[name]).add_arguments(parser)
        options = re.findall(r"^  (?:-\w[^-\n]*, )?(--[a-z-]+)", parser.format_help(), flags=re.MULTILINE)
        listed = re.findall(r"^\| `(--[a-z-]+)", section, flags=re.MULTILINE)
        assert sorted(["--help", *listed]) == sorted(options), name


def entries() -> set[str]:
    """What the pages describe. The build fails on an entry that does not exist; here the reverse is checked."""
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    return set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", text, flags=re.MULTILINE))


def public_modules() -> list[str]:
    """Modules that say what is public, found by their text: to import all of them takes seconds."""
    found = []
    for folder, name in ((Path(fusedonemoe.__file__).parent, "fusedonemoe"), (ROOT / "ops", "fusedonemoe.ops")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if "ops" not in parts and re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
                found.append(".".join((name, *parts)).removesuffix(".__init__"))
    return found


# What is below these is for the operators' own files.
MODULES = [name for name in public_modules() if not name.startswith("fusedonemoe.ops.")]


def test_public_modules_are_found():
    assert {"fusedonemoe", "fusedonemoe.functional", "fusedonemoe.ops", "fusedonemoe.integrations.peft"} <= set(MODULES)


@pytest.mark.parametrize("name", [*MODULES, *(f"fusedonemoe.compat.{name}" for name in compat.__all__)])
def test_every_public_name_has_an_entry(name):
    module = importlib.import_module(name)
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    # Other libraries' names are public without a list: all of a module of compat that is not private.
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    # A package re-exports objects that stand under another name; a module has a page and no entry.
    described = [pkgutil.resolve_name(entry) for entry in sorted(entries())]
    assert names
    for name in names:
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
