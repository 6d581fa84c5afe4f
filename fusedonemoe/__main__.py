"""The command line, ``python -m fusedonemoe`` or ``fusedonemoe``: demo, doctor, bench, report.

Each command is the module of its name here, with ``add_arguments(parser)`` and ``run(args) -> int``.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from fusedonemoe import __version__
from fusedonemoe.completion import SHELLS
from fusedonemoe.overview import overview

COMMANDS = {
    "demo": "train a small compiled MoE here",
    "doctor": "check this machine, and every operator on it",
    "bench": "time this library beside its peers, here",
    "report": "make one page of pictures of what bench measured",
}


class _PrintCompletion(argparse.Action):
    """Print the script and end, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        from fusedonemoe.completion import completion

        full, commands = _parsers()
        try:
            print(completion(str(args[1]), full, commands))
        except ImportError as error:
            if error.name != "shtab":
                raise
            parser.exit(2, "Completion needs shtab: pip install 'fusedonemoe[cli]'\n")
        parser.exit(0)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of its commands, which have no options yet."""
    parser = argparse.ArgumentParser(prog="fusedonemoe", description="Mixture-of-experts blocks for PyTorch and torch.compile.")
    parser.add_argument("--version", action="version", version=f"fusedonemoe {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script with which {', '.join(SHELLS)} complete this command line",
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands (COMMAND --help tells more)")
    return parser, {name: commands.add_parser(name, help=purpose) for name, purpose in COMMANDS.items()}


def _run_command(name: str, argv: Sequence[str]) -> int:
    # Only the command asked for is imported: the doctor has to run where another command cannot be.
    command = importlib.import_module(f"fusedonemoe.{name}")
    parser = argparse.ArgumentParser(prog=f"fusedonemoe {name}", description=command.__doc__)
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: the command's own, 0 when none was asked for, 130 when interrupted.

    Raises:
        SystemExit: by argparse, with 2 for an unknown command or option and 0 for ``--help``,
            ``--version`` and ``--print-completion``.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            return _run_command(argv[0], argv[1:])
        _parsers()[0].parse_args(argv)
        print(overview(__version__, COMMANDS))
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell reports it


if __name__ == "__main__":
    sys.exit(main())
