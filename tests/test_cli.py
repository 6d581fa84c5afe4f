"""The command line, with stand-ins for the commands that have tests of their own."""

import argparse
import subprocess
import sys
from types import ModuleType

import pytest

from fusedonemoe import __main__ as cli
from fusedonemoe import __version__


@pytest.fixture
def stand_ins(monkeypatch):
    """Replaces every command by one that prints what it was given and returns 7."""

    def run(args: argparse.Namespace) -> int:
        print(f"steps={args.steps}")
        return 7

    for name in cli.COMMANDS:
        module = ModuleType(f"fusedonemoe.{name}", f"What {name} is for.")
        vars(module).update(add_arguments=lambda parser: parser.add_argument("--steps", type=int, default=3), run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def exit_code(argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    return stopped.value.code


def test_without_arguments_it_says_what_can_be_done_next(capsys):
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and __version__ in out and "docs/" in out
    for name, purpose in cli.COMMANDS.items():
        (line,) = [line for line in out.splitlines() if f"python -m fusedonemoe {name}" in line]
        assert line.endswith(purpose)
    assert max(map(len, out.splitlines())) <= 80


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

    monkeypatch.setattr(sys.modules["fusedonemoe.demo"], "run", interrupted)
    assert cli.main(["demo"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err == "\ninterrupted\n"


def test_module_and_script_are_the_same_program():
    # Neither rich nor matplotlib: what the command line itself needs must not creep past torch and numpy.
    program = "import sys, runpy; sys.modules.update(rich=None, matplotlib=None); sys.argv = ['x', *{argv!r}]; {start}"
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
