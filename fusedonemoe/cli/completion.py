"""``--print-completion``: a script with which a shell completes this command line, made by shtab from the commands' parsers."""

import argparse
import importlib
from collections.abc import Mapping

from fusedonemoe.cli import MODULES

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for one of :data:`SHELLS`, from the parser of the command line and those of its commands, still empty.

    Raises:
        ImportError: shtab is not installed.
    """
    import shtab

    for name, command in commands.items():
        importlib.import_module(MODULES[name]).add_arguments(command)
    for each in (parser, *commands.values()):
        for action in each._actions:  # argparse has no public list of them, and shtab reads this one too
            # An option that takes a file or a folder says so by what stands for it in the help: FILE, OLD.json, DIR.
            placeholder = str(action.metavar or "")
            if placeholder == "FILE" or "." in placeholder:
                vars(action)["complete"] = shtab.FILE
            elif placeholder == "DIR":
                vars(action)["complete"] = shtab.DIRECTORY
    return str(shtab.complete(parser, shell=shell))
