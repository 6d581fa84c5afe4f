"""The command line, with stand-ins for the commands that have tests of their own."""

import argparse
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusedonemoe import MoEConfig, __version__, explain
from fusedonemoe import __main__ as cli
from fusedonemoe.cli import MODULES


@pytest.fixture
def stand_ins(monkeypatch):
    """Replaces every command by one that prints what it was given and returns 7."""

    def run(args: argparse.Namespace) -> int:
        print(f"steps={args.steps}")
        return 7

    for name in cli.COMMANDS:
        module = ModuleType(MODULES[name], f"What {name} is for.")
        vars(module).update(add_arguments=lambda parser: parser.add_argument("--steps", type=int, default=3), run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def exit_code(argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    return stopped.value.code


def test_without_arguments_it_says_what_can_be_done_next(capsys):
    explain(MoEConfig(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2))  # the first use compiles, and says so
    capsys.readouterr()
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and __version__ in out and "docs/" in out
    for name, purpose in cli.COMMANDS.items():
        (line,) = [line for line in out.splitlines() if f"python -m fusedonemoe {name}" in line]
        assert line.endswith(purpose)
    assert max(map(len, out.splitlines())) <= 80


def test_it_says_what_is_here_and_what_runs(capsys):
    told = explain(MoEConfig(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2))
    cli.main([])
    words = " ".join(capsys.readouterr().out.split())
    assert f"torch {torch.__version__}" in words and f"on cpu impl='{told.impl}': {told.reason}" in words
    for candidate in told.candidates:
        assert candidate.refusal is None or f"not {candidate.impl}: {candidate.refusal}" in words
    assert "installed: rich" in words and "needs" not in words


def test_it_says_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python takes for "not installed"
    monkeypatch.setitem(sys.modules, "transformers", None)
    cli.main([])
    words = " ".join(capsys.readouterr().out.split())
    assert "not installed: matplotlib, transformers; pip install 'fusedonemoe[hf,plot]'" in words
    assert "train a small compiled MoE here needs matplotlib: pip install 'fusedonemoe[plot]'" in words
    assert "matplotlib 3" not in words and words.count("needs") == 1


def test_version_and_help(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"fusedonemoe {__version__}\n"
    assert exit_code(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: fusedonemoe ") and all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("argv", [["benhc"], ["--quick"], ["--quick", "bench"]])
def test_what_it_does_not_know_is_an_error(argv, capsys, stand_ins):
    assert exit_code(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and argv[0] in err and "usage: fusedonemoe" in err


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    assert exit_code(["benhc"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_a_command_gets_its_arguments_and_gives_its_exit_code(name, capsys, stand_ins):
    assert cli.main([name]) == 7
    assert cli.main([name, "--steps", "5"]) == 7
    assert capsys.readouterr().out == "steps=3\nsteps=5\n"
    assert exit_code([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fusedonemoe {name} ") and "--steps" in out and f"What {name} is for." in out
    assert exit_code([name, "--stesp"]) == 2
    assert f"usage: fusedonemoe {name} " in capsys.readouterr().err


def test_arguments_come_from_the_process(monkeypatch, capsys, stand_ins):
    monkeypatch.setattr(sys, "argv", ["fusedonemoe", "demo", "--steps", "9"])
    assert cli.main() == 7
    assert capsys.readouterr().out == "steps=9\n"


def test_a_command_that_cannot_be_imported_does_not_stop_the_others(monkeypatch, stand_ins):
    monkeypatch.setitem(sys.modules, "fusedonemoe.bench", None)
    assert cli.main(["doctor"]) == 7


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys, stand_ins):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fusedonemoe.cli.demo"], "run", interrupted)
    assert cli.main(["demo"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err == "\ninterrupted\n"


class Refusing(io.StringIO):
    """An output that refuses what is written, or what is flushed."""

    def __init__(self, error, moment):
        super().__init__()
        self.error, self.moment = error, moment

    def write(self, text):
        if self.moment == "write":
            raise self.error
        return super().write(text)

    def flush(self):
        if self.moment == "flush":
            raise self.error


@pytest.mark.parametrize("moment", ["write", "flush"])
@pytest.mark.parametrize("argv", [["demo"], ["--version"], []])
def test_a_reader_that_went_away_ends_it_without_a_traceback(argv, moment, monkeypatch, capsys, stand_ins):
    monkeypatch.setattr(sys, "stdout", Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe"), moment))
    if argv == ["--version"] and moment == "write":  # argparse passes over it
        assert exit_code(argv) == 0
    else:
        assert cli.main(argv) == 141
    assert capsys.readouterr().err == ""


def test_a_reader_that_went_away_is_no_failure_of_a_peer(monkeypatch, stand_ins):
    console = pytest.importorskip("rich.console").Console

    def run(args):
        console(file=Refusing(BrokenPipeError(), "write")).print("a table")

    monkeypatch.setattr(sys.modules["fusedonemoe.bench"], "run", run)
    # rich would let the program end with 1, which is another thing for bench.
    monkeypatch.setattr("rich.console.os.dup2", lambda *args: None)
    assert cli.main(["bench"]) == 141


@pytest.mark.parametrize("moment", ["write", "flush"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_full_output_ends_it_with_two_and_the_reason(reason, moment, monkeypatch, capsys, stand_ins):
    monkeypatch.setattr(sys, "stdout", Refusing(OSError(reason, os.strerror(reason)), moment))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == f"cannot write the output: {os.strerror(reason)}\n"


def test_other_errors_of_the_system_are_not_taken_for_the_output(monkeypatch, stand_ins):
    def run(args):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/else")

    monkeypatch.setattr(sys.modules["fusedonemoe.cli.demo"], "run", run)
    with pytest.raises(OSError, match="/somewhere/else"):
        cli.main(["demo"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_terminal_lacks_ends_nothing(encoding, monkeypatch, stand_ins):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys.modules["fusedonemoe.cli.demo"], "run", lambda args: print("x \u2500 \ud800") or 0)
    assert cli.main(["demo"]) == 0
    sign = "\u2500".encode() if encoding == "utf-8" else rb"\u2500"
    assert written.getvalue() == b"x " + sign + rb" \ud800" + b"\n" and sys.stdout.errors == "strict"


@pytest.mark.parametrize("columns", ["0", "1", "-1", "x"])
def test_any_width_of_the_terminal_will_do(columns, monkeypatch, capsys, stand_ins):
    monkeypatch.setenv("COLUMNS", columns)
    console = pytest.importorskip("rich.console").Console
    monkeypatch.setattr(sys.modules["fusedonemoe.cli.demo"], "run", lambda args: console().print("abc") or 0)
    assert cli.main(["demo"]) == 0 and "".join(capsys.readouterr().out.split()) == "abc"
    for argv in (["--help"], ["bench", "--help"]):
        assert exit_code(argv) == 0


def test_a_closed_pipe_is_told_by_the_exit_status():
    results = Path(__file__).parents[2] / "docs" / "results" / "dial.json"
    command = [sys.executable, "-m", "fusedonemoe", "report", str(results), "-o", "/dev/stdout"]
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


def completed(script, words):
    """What bash offers for the last of the words."""
    count = len(words) - 1
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={count}; _shtab_fusedonemoe x {words[-1]!r}"
    ask += "; printf '%s ' \"${COMPREPLY[@]}\""
    run = subprocess.run(["bash", "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True, timeout=60, check=True)
    return set(run.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_suites_and_files(capsys, tmp_path, monkeypatch):
    pytest.importorskip("shtab")
    assert exit_code(["--print-completion", "bash"]) == 0
    script, err = capsys.readouterr()
    assert err == ""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").touch()
    (tmp_path / "folder").mkdir()
    for words, offered in {
        ("fusedonemoe", "d"): {"demo", "doctor"},
        ("fusedonemoe", "--v"): {"--version"},
        ("fusedonemoe", "bench", "--su"): {"--suite"},
        ("fusedonemoe", "bench", "--suite", "qu"): {"quick", "quantized"},
        ("fusedonemoe", "bench", "--compare", "o"): {"old.json"},
        ("fusedonemoe", "report", "o"): {"old.json"},
        ("fusedonemoe", "demo", "--output", "f"): {"folder"},
    }.items():
        assert completed(script, words) == offered, words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_can_read_theirs(shell, capsys):
    pytest.importorskip("shtab")
    assert exit_code(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS) and "suite" in script and "quantized" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, timeout=60, check=True)


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert exit_code(["--print-completion", "bash"]) == 2
    assert capsys.readouterr() == ("", "Completion needs shtab: pip install 'fusedonemoe[cli]'\n")
    assert exit_code(["--print-completion", "cmd"]) == 2


def test_module_and_script_are_the_same_program():
    # No rich, shtab or matplotlib: what the command line itself needs must not creep past torch and numpy.
    program = (
        "import sys, runpy; sys.modules.update(rich=None, shtab=None, matplotlib=None); sys.argv = ['x', *{argv!r}]; {start}"
    )
    starts = [
        "runpy.run_module('fusedonemoe', run_name='__main__', alter_sys=True)",
        "from fusedonemoe.__main__ import main; sys.exit(main())",
    ]
    outputs = []
    for start in starts:
        code = program.format(argv=["--help"], start=start)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1] and outputs[0].startswith("usage: fusedonemoe ")
