"""The command line, ``python -m fusedonemoe`` or ``fusedonemoe``: demo, doctor, bench, report.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> int``.
"""

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from fusedonemoe import __version__
from fusedonemoe.cli import MODULES
from fusedonemoe.cli.overview import overview

COMMANDS = {
    "demo": "train a small compiled MoE here",
    "doctor": "check this machine and every operator on it",
    "bench": "compare this library with others on this machine",
    "report": "draw the results of bench as one page",
}
SHELLS = ("bash", "zsh", "fish")
# 128 + SIGPIPE, as a shell reports it.
PIPE_CLOSED = 141
# Why a stream that is open takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _PrintCompletion(argparse.Action):
    """Print a script with which a shell completes this command line, made by shtab from the parsers, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        try:
            import shtab
        except ImportError as error:
            if error.name != "shtab":
                raise
            parser.exit(2, "Completion needs shtab: pip install 'fusedonemoe[cli]'\n")
        full, commands = _parsers()
        for name, command in commands.items():
            importlib.import_module(MODULES[name]).add_arguments(command)
        for each in (full, *commands.values()):
            for action in each._actions:  # argparse has no public list of them, and shtab reads this one too
                # An option that takes a file or a folder says so by what stands for it in the help: FILE, OLD.json, DIR.
                placeholder = str(action.metavar or "")
                if placeholder == "FILE" or "." in placeholder:
                    vars(action)["complete"] = shtab.FILE
                elif placeholder == "DIR":
                    vars(action)["complete"] = shtab.DIRECTORY
        print(shtab.complete(full, shell=str(args[1])))
        parser.exit(0)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Make the parser of the command line, and those of its commands, which have no options yet."""
    parser = argparse.ArgumentParser(prog="fusedonemoe", description="Mixture-of-experts blocks for PyTorch and torch.compile.")
    parser.add_argument("--version", action="version", version=f"fusedonemoe {__version__}")
    told = f"print a script with which {', '.join(SHELLS)} complete this command line"
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=SHELLS, metavar="SHELL", help=told)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands (COMMAND --help tells more)")
    return parser, {name: commands.add_parser(name, help=purpose) for name, purpose in COMMANDS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: the command's own, 0 when none was asked for, 130 when interrupted, 141 when the reader of the output went
        away, 2 when the output cannot be written.

    Raises:
        SystemExit: by argparse, with 2 for an unknown command or option and 0 for ``--help``,
            ``--version`` and ``--print-completion``.
    """
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _dispatch(given))


def guarded(command: Callable[[], int]) -> int:
    """Run a command that returns its exit code; turn an interruption or a failing output into one, as :func:`main` does."""
    if os.environ.get("COLUMNS", "").strip() == "0":
        del os.environ["COLUMNS"]  # It means unknown, and rich would print nothing into 0 columns.
    try:
        with _every_character():
            try:
                return command()
            finally:  # while an error of what Python still holds of the output can be reported
                if sys.stdout is not None and not sys.stdout.closed:
                    sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell reports it
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich ends the program with 1, which other failures end with
            return PIPE_CLOSED
        raise
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        _drop_output()
        print(f"cannot write the output: {error.strerror}", file=sys.stderr)
        return 2


def _dispatch(argv: Sequence[str]) -> int:
    if argv and (name := argv[0]) in COMMANDS:
        # Only the command asked for is imported: the doctor has to run where another command cannot be.
        command = importlib.import_module(MODULES[name])
        parser = argparse.ArgumentParser(prog=f"fusedonemoe {name}", description=command.__doc__)
        command.add_arguments(parser)
        return int(command.run(parser.parse_args(argv[1:])))
    _parsers()[0].parse_args(argv)
    print(overview(__version__, COMMANDS))
    return 0


@contextmanager
def _every_character() -> Iterator[None]:
    """Write a character that the encoding of stdout lacks as its number, where Python would raise an error."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")


def _drop_output() -> None:
    """Let what is left of the output go nowhere, for Python would try to write it once more at its end."""
    with suppress(OSError, ValueError):  # a stand-in without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
