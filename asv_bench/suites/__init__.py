"""Benchmarks that prove this project's claims: ``python -m asv_bench.suites SUITE``, in a checkout. Users need none of them.

Cells, peers, timing, result files and options are those of :mod:`fusedonemoe.bench`.
"""

import argparse
import re

from fusedonemoe import bench
from fusedonemoe.bench import CELLS, PEERS, Suite
from fusedonemoe.cli import options

# The overhead and the smallest block.
QUICK = "overhead|block-T1-D128-.*-float32-forward"
REGISTRY: dict[str, Suite] = {
    name: Suite(f"asv_bench.suites.{module}", purpose, taken)
    for name, module, purpose, taken in (
        ("seeds", "seed_suite", "the tables of FusedOneMoE, candle-moe, MoMoE, MoeKernel and FlashMoE", PEERS | {"dry"}),
        ("serving", "serving", "requests to a compiled model, one by one and at once", CELLS | {"peers", "dry"}),
        ("memory", "dial", "bytes that a training step holds and reaches at each save_percent", CELLS | {"dry"}),
        ("dial", "dial", "the first table of `memory`, at which README makes its promise", CELLS),
        ("lora", "lora", "a training step of adapters on experts, here and by PEFT", CELLS),
        ("transformers", "hf_model", "a whole model of transformers, with its experts and with ours", CELLS),
        ("fine-grained", "fine_grained", "product keys, single-neuron experts and value memory", PEERS),
        ("compile", "compiled", "the block and a model around it, eager and compiled, and the overhead of a call", CELLS),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite and the options of the benchmark to a parser."""
    parser.add_argument("suite", choices=list(REGISTRY), metavar="SUITE", help="one of those below")
    bench.add_options(parser, REGISTRY)
    quick = re.compile(QUICK)
    parser.add_argument(
        "--quick", action="store_const", dest="cells", const=quick, help=f"of the suite compile: --cells '{QUICK}'"
    )
    targets = parser.add_argument_group("of the suite serving")
    targets.add_argument("--target-ms", type=options.above_zero, metavar="MS", help="for 95 %% of the requests (100)")
    targets.add_argument("--target-tokens", type=options.above_zero, metavar="N", help="in a second (1000)")


def run(args: argparse.Namespace) -> int:
    """Run a suite; the exit status is that of :func:`fusedonemoe.bench.run`."""
    return bench.run_from(REGISTRY, args)
