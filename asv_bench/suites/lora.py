"""Adapters on the experts of a Qwen3-MoE: a training step here and by PEFT, its time and the memory it takes.

The model is frozen but for adapters of rank 8 on both projections. PEFT's is the model that it wraps, in eager mode, as its
parametrizations break graphs; ours has the same adapters, taken over from it, in eager mode and compiled with
``fullgraph=True``. A step is a forward and a backward pass down to the embeddings, and it must agree with PEFT's to get a time.
Memory is the most bytes that a step holds at one moment, gradients of the adapters included and weights not; what the adapters
add is the difference to the step of the same model with its adapters merged, which has gradients of the embeddings alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor, nn

from asv_bench.suites import lines
from asv_bench.suites.lines import LinesResult, result_of, times_of
from asv_bench.suites.model_work import Account, account_of, adapter_work
from fusedonemoe.bench import report, session
from fusedonemoe.bench.ceilings import Ceilings
from fusedonemoe.bench.memory import peak_extra_bytes
from fusedonemoe.bench.peers import BUDGET, OURS, relative_error
from fusedonemoe.bench.timing import Timer, time_interleaved

PEFT, COMPILED, FROZEN = "peft", f"{OURS}, compiled", f"{OURS}, no adapters"
# T, D, F, E, K, layers.
SIZES = (256, 512, 256, 64, 8, 4)
RANK, ALPHA = 8, 16
VOCABULARY = 1024
ROUNDS = 9
# Of the bytes that the gradients of the frozen experts would take.
MOST_SHARE = 0.1


@dataclass(frozen=True)
class LoraCell(lines.SizedCell):
    """One table; L is the number of layers."""

    LETTERS: ClassVar[str] = "TDFEKL"

    @property
    def described(self) -> dict[str, Any]:
        """The operator, sizes and mode, for the file."""
        return {"operator": "adapters", **self.by_letter, "mode": "training"}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: as printed.
        peak_bytes: the most that a step holds.
        share: what the adapters add to it, as a share of the bytes of the frozen experts' gradients.
        seconds: median of a step; None when its numbers were wrong.
        p95_seconds: 95 of 100 calls took no longer.
        p99_seconds: 99 of 100 calls took no longer.
        calls: how many were timed.
        relative: median over the turns of its time as a share of PEFT's.
        error: of the logits and the gradient of the embeddings, the greater, relative to PEFT's.
        note: in place of a time.
    """

    name: str
    peak_bytes: int
    share: float | None = None
    seconds: float | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    calls: int = 0
    relative: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def problem(self) -> str:
        """The problem with it: its note, or more memory than adapters may take; empty otherwise."""
        if not self.note and self.name in (OURS, COMPILED) and (self.share or 0) > MOST_SHARE:
            return f"adds {100 * (self.share or 0):.1f} % of the frozen gradients, more than {100 * MOST_SHARE:.0f} %"
        return self.note


@dataclass(frozen=True)
class Adapted:
    """A model by PEFT.

    Attributes:
        model: with its adapters.
        account: of what is frozen.
        adapters: their parameters.
        active_adapters: those that one token is multiplied with.
    """

    model: Any
    account: Account
    adapters: int
    active_adapters: int


def _peft_model(sizes: Sequence[int], dtype: torch.dtype) -> Adapted:
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
    account = account_of(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    # Each expert has factors of its own.
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    return Adapted(model, account, adapters, adapters * K // E)


def _step_of(forward: Callable[..., Any], wanted: Sequence[Tensor], embeddings: Tensor) -> Callable[[], list[Tensor]]:
    dy = torch.randn(1, embeddings.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(2), device="cpu").to(
        embeddings.dtype
    )

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


def measure(
    cell: LoraCell, *, ceilings: Ceilings, backend: str = "inductor", real_time: bool = True
) -> LinesResult[LoraCell, Line]:
    """One table.

    Args:
        cell: what to measure.
        ceilings: of the run; sampled between the turns.
        backend: of torch.compile.
        real_time: ask for real-time priority while timing.
    """
    from fusedonemoe.integrations.peft import from_peft

    sizes, dtype = cell.sizes, cell.dtype
    embeddings = (
        torch.randn(1, sizes[0], sizes[1], generator=torch.Generator().manual_seed(1), device="cpu").to(dtype).requires_grad_()
    )

    def trained(model: nn.Module) -> list[Tensor]:
        return [embeddings, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    made = _peft_model(sizes, dtype)
    theirs, ours = made.model, _peft_model(sizes, dtype).model
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
    found = {}
    for name, step in steps.items():
        error = max(relative_error(a, b) for a, b in zip(_answer(step), expected, strict=True))
        note = "" if error <= BUDGET[dtype] else f"off by {error:.1e}"
        found[name] = Line(name, _held(step), error=error, note=note)
    for module in adapted.values():
        module.merge()
    frozen = _step_of(ours, [embeddings], embeddings)
    frozen()
    least = _held(frozen)
    for module in adapted.values():
        module.unmerge()
    found = {name: replace(line, share=(line.peak_bytes - least) / frozen_bytes) for name, line in found.items()}

    turns = {name: lambda turn, step=steps[name]: step() for name, line in found.items() if not line.note}
    times = time_interleaved(Timer(real_time=real_time), turns, rounds=cell.rounds, between=ceilings.sampler(dtype))
    for name, taken in times.items():
        relative = median(mine / its for mine, its in zip(taken, times[PEFT], strict=True))
        found[name] = replace(found[name], relative=relative, **times_of(taken))
    return result_of(
        cell,
        [*found.values(), Line(FROZEN, least)],
        ceilings,
        work=adapter_work(made.account, length=sizes[0], adapters=made.active_adapters),
        parameters=made.account.parameters + made.adapters,
        active_parameters=made.account.active_parameters + made.active_adapters,
    )


def table_of(result: LinesResult[LoraCell, Line]) -> Table:
    """The lines as a table.

    Args:
        result: of a cell.
    """
    floor, table = result.floor, Table(title=result.title, title_justify="left")
    for heading in ("who", "peak MB", "adapters' share of frozen gradients", "step ms", "p95 ms", "x floor", "x peft"):
        table.add_column(heading, justify="left" if heading == "who" else "right", no_wrap=heading == "who")
    for line in result.lines:
        table.add_row(
            line.name,
            f"{line.peak_bytes / 1e6:.1f}",
            "" if line.share is None else f"{100 * line.share:.1f} %",
            report.milliseconds(line.seconds) if line.seconds else line.note,
            report.milliseconds(line.p95_seconds) if line.p95_seconds else "",
            f"{line.seconds / floor.seconds:.2f}" if line.seconds and floor else "",
            f"{line.relative:.2f}" if line.relative else "",
            style="red" if line.problem else None,
        )
    return table


def cells() -> list[LoraCell]:
    """The tables, in float32 and bfloat16."""
    return [LoraCell(dtype, ROUNDS, SIZES) for dtype in (torch.float32, torch.bfloat16)]


def run(args: argparse.Namespace) -> int:
    """Print the tables.

    Args:
        args: of the benchmark's command.

    Returns:
        The exit status of :func:`fusedonemoe.bench.session.run_cells`; 1 when a number was off, or our adapters took
        more memory than promised; 2 when a library is missing.
    """
    if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
        print(f"the suite {args.suite} compares with {missing}: pip install 'fusedonemoe[bench]'", file=sys.stderr)
        return session.EXIT_USAGE
    ceilings = Ceilings()
    return lines.run(
        args,
        cells(),
        measure=lambda cell: measure(cell, ceilings=ceilings, real_time=not args.no_rt),
        table_of=table_of,
    )
