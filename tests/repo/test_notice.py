"""Notices: a stderr that is missing, closed or full neither raises nor is written twice, and nothing prints past them."""

import ast
import contextlib
import io
import sys
import warnings

import pytest
import torch

from fusedonemoe import MoE
from fusedonemoe.balance import LossFreeBalance
from fusedonemoe.ops import notice
from tests.repo.test_layout import MODULES, is_inside

# Commands, which print because somebody asked them to.
COMMANDS = [f"fusedonemoe.{name}" for name in ("__main__", "bench", "cli", "report")]


class Refusing(io.StringIO):
    def write(self, text):
        raise RuntimeError("no")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = [lambda: None, closed, Refusing, lambda: open("/dev/full", "w")]  # noqa: SIM115
needs_full = pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full")


def show_as_python_does(message, category, filename, lineno, file=None, line=None):
    """Python's way; pytest's would keep the warning for itself."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


@needs_full
@pytest.mark.parametrize("make", STREAMS)
@pytest.mark.parametrize("tell", [notice.say, notice.warn])
def test_a_notice_never_raises(make, tell, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", make())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_as_python_does)
        tell("a line")
    monkeypatch.undo()
    assert capfd.readouterr().out == ""


def test_a_line_goes_to_whatever_stderr_is(monkeypatch, tmp_path, capsys):
    notice.say("one")
    assert capsys.readouterr().err == "fusedonemoe: one\n"
    path = tmp_path / "file"
    with path.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stderr", file)
        file.write("before\n")
        notice.say("gr\u00f6\u00dfe")
        file.write("after\n")
    assert path.read_text() == "before\nfusedonemoe: gr\\xf6\\xdfe\nafter\n"


def test_a_warning_points_at_its_caller_and_may_be_an_error():
    with pytest.warns(DeprecationWarning, match="old") as seen:
        notice.warn("old", DeprecationWarning)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="now an error"):
            notice.warn("now an error")


def test_balancing_warns_without_stderr(monkeypatch):
    moe = MoE(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2, selection_bias=True)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    LossFreeBalance(moe, optimizer)
    monkeypatch.setattr(sys, "stderr", closed())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_as_python_does)
        optimizer.step()


def test_nothing_else_prints_or_warns():
    """A sibling would be a notice of a layer or an operator that raises where stderr is closed."""
    found = []
    for module, path in MODULES.items():
        if module == "fusedonemoe.ops.notice" or any(is_inside(module, command) for command in COMMANDS):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        names = ("print", "warnings.warn", "sys.stderr.write")
        found += [f"{path}:{call.lineno}" for call in calls if ast.unparse(call.func) in names]
    assert found == []
