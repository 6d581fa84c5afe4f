"""The demo: ``python -m fusedonemoe demo`` trains two small models side by side and shows the results.

A mixture-of-experts transformer and a dense one with as many active parameters learn the source of Python's standard
library on the same batches; then one layer is timed against the usual per-expert loop and the dense formulation.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusedonemoe import files
from fusedonemoe.cli import options
from fusedonemoe.cli.overview import NEEDS, is_installed

PICTURE = "fusedonemoe-demo.png"
# torch takes 64 bits; the demo also counts up from its seed.
MOST_SEED = 2**63 - 1
MOST_STEPS = 10**9
MOST_PROCESSES = 1024
# Seconds that torchrun has for ending its processes after Ctrl-C, before it is asked to once more.
PATIENCE = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sizes of a demo run."""

    hidden_size: int = 128  # ``D`` of both models
    num_layers: int = 4  # ``L``, transformer blocks
    num_heads: int = 4  # attention heads
    num_experts: int = 32  # ``E`` of each MoE block
    top_k: int = 2  # ``K``
    intermediate_size: int = 64  # ``F`` of one expert; the dense baseline's is ``K * F``
    window: int = 256  # ``S``, bytes that a model sees at once
    batch: int = 8  # ``B``, windows per step
    steps: int = 400  # optimizer steps
    learning_rate: float = 3e-3  # peak of the schedule
    balance_weight: float = 0.01  # factor on the load-balancing loss
    validations: int = 8  # how often both models are validated, evenly spread, the last time after the last step
    validation_batches: int = 16  # batches in one validation
    sample_bytes: int = 320  # length of the generated text
    throughput_experts: int = 128  # the larger ``E`` of the throughput comparison
    throughput_rounds: int = 5  # timed calls per peer, of which the median counts

    @property
    def tokens_per_step(self) -> int:
        """Bytes that one step trains on."""
        return self.batch * self.window


FULL = Settings()
_SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_experts": 8, "intermediate_size": 32, "window": 64}
_SHORT = {"steps": 30, "validations": 3, "validation_batches": 2, "sample_bytes": 80}
QUICK = Settings(**_SMALL, **_SHORT, throughput_experts=16, throughput_rounds=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    add, threads = parser.add_argument, options.whole(1, options.MOST_THREADS)
    add("--quick", action="store_true", help="tiny models and few steps: shows that it runs, not that it learns")
    add("--steps", type=options.whole(1, MOST_STEPS), help="optimizer steps of each model")
    seed = "of the weights, the batches and the sample, from 0 to 2**63 - 1 (default %(default)s)"
    add("--seed", type=options.whole(0, MOST_SEED), default=0, help=seed)
    add("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    add("--threads", type=threads, help="CPU threads (default: torch's choice)")
    nproc = "processes that share the experts and the batch, on this machine (default 1)"
    add("--nproc", type=options.whole(1, MOST_PROCESSES), default=1, help=nproc)
    add("--no-compile", action="store_true", help="run everything without torch.compile")
    output = "folder of the picture (default %(default)s)"
    add("--output", type=options.path, default=Path("demo-output"), metavar="DIR", help=output)


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        The exit code: 0; 1 when a layer that should agree does not; 2 when something that it needs is not there, or the picture
        cannot be written.
    """
    if missing := [package for package in NEEDS["demo"] if not is_installed(package)]:
        print(f"The demo needs {' and '.join(missing)}: pip install 'fusedonemoe[cli,plot]'", file=sys.stderr)
        return 2
    try:
        if args.nproc > 1:
            return _launch(args)
        from fusedonemoe.cli.demo.program import run as run_program  # only now: it imports the extras

        return run_program(args)
    except files.UnwritableError as reason:
        print(f"--output: {reason}", file=sys.stderr)
        return 2


def _launch(args: argparse.Namespace) -> int:
    """The same command once more, in as many processes as it asks for, by torchrun."""
    if FULL.batch % args.nproc:
        print(f"The demo cannot run here: --nproc must divide the batch of {FULL.batch}, got {args.nproc}", file=sys.stderr)
        return 2
    files.check(args.output / PICTURE)
    threads = max(1, (args.threads or os.cpu_count() or 1) // args.nproc)  # together as many as one process would use
    # Without --nproc: the processes hear from torchrun how many they are, and torchrun would take it for an option of its own.
    asked = {**vars(args), "threads": threads, "nproc": None}
    given = {f"--{name.replace('_', '-')}": value for name, value in asked.items() if value is not None and value is not False}
    flags = [option if value is True else f"{option}={value}" for option, value in given.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}"]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}  # else torchrun sets 1, and warns
    return _exit_code_of([*torchrun, "-m", "fusedonemoe", "demo", *flags], environment)


def _exit_code_of(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; on Ctrl-C too, for torchrun then has to end its own processes."""
    with subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(PATIENCE)  # The terminal sends Ctrl-C to torchrun as well.
            except subprocess.TimeoutExpired:
                process.terminate()
            raise
    return status if status >= 0 else 128 - status  # ended by a signal, as a shell reports it
