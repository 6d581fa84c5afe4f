"""The command line, ``python -m fusedonemoe`` or ``fusedonemoe``: demo, doctor, bench, report.

Each command is the module of its name here, with ``add_arguments(parser)`` and ``run(args) -> int``.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from fusedonemoe import __version__

COMMANDS = {
    "demo": "train a small compiled MoE here",
    "doctor": "check this machine, and every operator on it",
    "bench": "time this library beside its peers, here",
    "report": "make one page of pictures of what bench measured",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedonemoe", description="Mixture-of-experts blocks for PyTorch and torch.compile.")
    parser.add_argument("--version", action="version", version=f"fusedonemoe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands (COMMAND --help tells more)")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    return parser


def _overview() -> str:
    lines = [f"FusedOneMoE {__version__}: mixture-of-experts blocks for PyTorch and torch.compile.", "", "Next:"]
    lines += [f"  python -m fusedonemoe {name:8s}{purpose}" for name, purpose in COMMANDS.items()]
    lines += ["", "Each takes --help. To read on: help(fusedonemoe.MoE), README.md, docs/."]
    return "\n".join(lines)


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
        SystemExit: by argparse, with 2 for an unknown command or option and 0 for ``--help`` and ``--version``.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            return _run_command(argv[0], argv[1:])
        _parser().parse_args(argv)
        print(_overview())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell reports it


if __name__ == "__main__":
    sys.exit(main())
