"""The demo: ``python -m fusedonemoe demo`` trains two small models side by side and shows what came of it.

A mixture-of-experts transformer and a dense one with as many active parameters learn the source of Python's standard
library on the same batches; then one layer is timed against the usual per-expert loop and the dense formulation.
"""

import argparse
import os
import subprocess
import sys

from fusedonemoe.overview import NEEDS, is_installed


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps: shows that it runs, not that it learns")
    parser.add_argument("--steps", type=_positive, help="optimizer steps of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the sample (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--nproc", type=_positive, default=1, help="processes that share the experts and the batch, on this machine (default 1)"
    )
    parser.add_argument("--no-compile", action="store_true", help="run everything without torch.compile")
    parser.add_argument("--output", default="demo-output", metavar="DIR", help="folder of the picture (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        args: what a parser with :func:`add_arguments` returned.

    Returns:
        The exit code: 0; 1 when a layer that should agree does not; 2 when something that it needs is not there.
    """
    missing = [package for package in NEEDS["demo"] if not is_installed(package)]
    if missing:
        print(
            f"The demo needs {' and '.join(missing)}: pip install 'fusedonemoe[cli,plot]'",
            file=sys.stderr,
        )
        return 2
    if args.nproc > 1:
        return _launch(args)
    from fusedonemoe.demo.program import run as run_program  # only now: it imports the extras

    return run_program(args)


def _launch(args: argparse.Namespace) -> int:
    """The same command once more, in as many processes as it asks for, by torchrun."""
    from fusedonemoe.demo.settings import FULL

    if FULL.batch % args.nproc:
        print(f"The demo cannot run here: --nproc must divide the batch of {FULL.batch}, got {args.nproc}", file=sys.stderr)
        return 2
    threads = max(1, (args.threads or os.cpu_count() or 1) // args.nproc)  # together as many as one process would use
    options = []
    # Without --nproc: the processes hear from torchrun how many they are, and torchrun would take it for an option of its own.
    for name, value in {**vars(args), "threads": threads, "nproc": None}.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            options.append(option)
        elif value is not None and value is not False:
            options.append(f"{option}={value}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}"]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}  # else torchrun sets 1, and warns
    return subprocess.run([*torchrun, "-m", "fusedonemoe", "demo", *options], env=environment, check=False).returncode
