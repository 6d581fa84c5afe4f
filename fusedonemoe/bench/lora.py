"""Adapters on the experts of a Qwen3-MoE: a training step here and by PEFT, its time and the memory it takes.

The model is frozen but for adapters of rank 8 on both projections. PEFT's is the model that it wraps, in eager mode, as its
parametrizations break graphs; ours has the same adapters, taken over from it, in eager mode and compiled with
``fullgraph=True``. A step is a forward and a backward pass down to the embeddings, and it must agree with PEFT's to get a time.
Memory is the most bytes that a step holds at one moment, gradients of the adapters included and weights not; what the adapters
add is the difference to the step of the same model with its adapters merged, which has gradients of the embeddings alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fusedonemoe.bench import report
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import BUDGET, OURS, relative_error
from fusedonemoe.bench.priority import RealTime
from fusedonemoe.bench.runner import order_of_round

PEFT, COMPILED, FROZEN = "peft", f"{OURS}, compiled", f"{OURS}, no adapters"
# T, D, F, E, K, layers.
SIZES = (256, 512, 256, 64, 8, 4)
RANK, ALPHA = 8, 16
VOCABULARY = 1024
ROUNDS = 9
# Of the bytes that the gradients of the frozen experts would take.
MOST_SHARE = 0.1


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: who.
        peak_bytes: the most that a step holds.
        share: what the adapters add to it, as a share of the bytes of the frozen experts' gradients.
        seconds: median of a step; None when its numbers were wrong.
        relative: median over the turns of its time as a share of PEFT's.
        note: in place of a time.
    """

    name: str
    peak_bytes: int
    share: float | None = None
    seconds: float | None = None
    relative: float | None = None
    note: str = ""


def _peft_model(sizes: Sequence[int], dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    _, D, inner, E, K, layers = sizes
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "moe_intermediate_size": inner,
        "intermediate_size": inner,
        "num_experts": E,
        "num_experts_per_tok": K,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": max(D // 8, 8),
        "norm_topk_prob": True,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings), dtype=dtype)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _step_of(forward: Callable[..., Any], wanted: Sequence[Tensor], embeddings: Tensor) -> Callable[[], list[Tensor]]:
    dy = torch.randn(1, embeddings.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(2)).to(embeddings.dtype)

    def step() -> list[Tensor]:
        logits = forward(inputs_embeds=embeddings, use_cache=False).logits
        return [logits.detach(), *torch.autograd.grad(logits, wanted, dy)]

    return step


def _held(step: Callable[[], Any]) -> int:
    """The most bytes of a step; nothing of what it returns is left out, the adapters' gradients are part of what it takes."""

    def call() -> list[Tensor]:
        step()
        return []

    return peak_extra_bytes(call)


def _answer(step: Callable[[], list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits and gradient of the embeddings, which is made of every layer's."""
    logits, dembeddings, *_ = step()
    return logits.double(), dembeddings.double()


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(
    sizes: Sequence[int], dtype: torch.dtype, *, rounds: int = ROUNDS, backend: str = "inductor", real_time: bool = True
) -> list[Line]:
    """One table.

    Args:
        sizes: T, D, F, E, K and the number of layers.
        dtype: of the model and the adapters.
        rounds: how often each step is timed, all in turns.
        backend: of torch.compile.
        real_time: ask for real-time priority while timing.
    """
    from fusedonemoe.integrations.peft import from_peft

    embeddings = torch.randn(1, sizes[0], sizes[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()

    def trained(model: nn.Module) -> list[Tensor]:
        return [embeddings, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    theirs, ours = _peft_model(sizes, dtype), _peft_model(sizes, dtype)
    frozen_bytes = sum(p.nbytes for name, p in theirs.named_parameters() if name.endswith(("gate_up_proj", "down_proj")))
    adapted = from_peft(ours)
    for module in adapted.values():
        # Without adapters too, or the difference would be one of implementations.
        module.form = replace(module.form, impl="grouped")
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    steps = {
        PEFT: _step_of(theirs, trained(theirs), embeddings),
        OURS: _step_of(ours, trained(ours), embeddings),
        COMPILED: _step_of(compiled, trained(ours), embeddings),
    }
    expected = _answer(steps[PEFT])
    lines = {}
    for name, step in steps.items():
        error = max(relative_error(a, b) for a, b in zip(_answer(step), expected, strict=True))
        lines[name] = Line(name, _held(step), note="" if error <= BUDGET[dtype] else f"off by {error:.1e}")
    for module in adapted.values():
        module.merge()
    frozen = _step_of(ours, [embeddings], embeddings)
    frozen()
    least = _held(frozen)
    for module in adapted.values():
        module.unmerge()
    lines = {name: replace(line, share=(line.peak_bytes - least) / frozen_bytes) for name, line in lines.items()}

    times: dict[str, list[float]] = {name: [] for name, line in lines.items() if not line.note}
    for turn in range(rounds):
        for name in order_of_round(list(times), turn):
            with RealTime(real_time):
                times[name].append(_seconds(steps[name]))
    for name, taken in times.items():
        relative = median(mine / its for mine, its in zip(taken, times[PEFT], strict=True)) if taken else None
        lines[name] = replace(lines[name], seconds=median(taken) if taken else None, relative=relative)
    return [*lines.values(), Line(FROZEN, least)]


def table_of(title: str, lines: Sequence[Line]) -> Table:
    """The lines as a table.

    Args:
        title: above it.
        lines: from :func:`measure`.
    """
    table = Table(title=title, title_justify="left")
    for heading in ("who", "peak MB", "adapters' share of frozen gradients", "step ms", "x peft"):
        table.add_column(heading, justify="left" if heading == "who" else "right", no_wrap=heading == "who")
    for line in lines:
        table.add_row(
            line.name,
            f"{line.peak_bytes / 1e6:.1f}",
            "" if line.share is None else f"{100 * line.share:.1f} %",
            report.milliseconds(line.seconds) if line.seconds else line.note,
            f"{line.relative:.2f}" if line.relative else "",
            style="red" if line.note else None,
        )
    return table


def run(args: argparse.Namespace) -> int:
    """Print the tables, in float32 and bfloat16.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status: 0; 1 when somebody's numbers were off, or our adapters took more memory than promised; 2 when a
        library is missing.
    """
    if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
        print(f"--suite {args.suite} compares with {missing}: pip install 'fusedonemoe[bench]'", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = report.describe_run(suite=args.suite)
        report.print_heading(settings)
        tables = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = "-".join(f"{letter}{n}" for letter, n in zip("TDFEKL", SIZES, strict=True)) + "-" + str(dtype)[6:]
            tables[name] = measure(SIZES, dtype, rounds=ROUNDS, real_time=not args.no_rt)
            report.console().print(table_of(name, tables[name]), highlight=False)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        result = {"schema": 1, **settings, "tables": {name: list(map(asdict, lines)) for name, lines in tables.items()}}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    wrong = [
        (line, line.note or f"adds {100 * (line.share or 0):.1f} % of the frozen gradients, more than {100 * MOST_SHARE:.0f} %")
        for lines in tables.values()
        for line in lines
        if line.note or (line.name in (OURS, COMPILED) and (line.share or 0) > MOST_SHARE)
    ]
    for line, problem in wrong:
        print(f"{line.name}: {problem}", file=sys.stderr)
    return 1 if wrong else 0
