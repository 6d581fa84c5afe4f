"""The implementation that a layer uses, and the reason."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.config import MoEConfig
from fusedonemoe.functional.neurons import choose_tables
from fusedonemoe.layers import Experts, MoE
from fusedonemoe.layers.fine_grained import FineGrainedMoE
from fusedonemoe.layers.fused_one_moe import FusedOneMoE
from fusedonemoe.layers.lora import LoRAExperts
from fusedonemoe.layers.quantized import QuantizedExperts
from fusedonemoe.ops import IMPLEMENTATIONS, Work, choose, count_work
from fusedonemoe.ops.choice import refusal
from fusedonemoe.ops.triton.rules import architecture, describe


@dataclass(frozen=True)
class Candidate:
    """One implementation as :func:`~fusedonemoe.explain` sees it.

    Attributes:
        impl: its name.
        work: matrix-product operations and expert-weight bytes of one forward.
        refusal: why it cannot run here; None when it can.
    """

    impl: str
    work: Work
    refusal: str | None


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`~fusedonemoe.explain`; ``str()`` is a small table.

    Attributes:
        operator: the operator that the layer calls: ``experts_mlp``, ``experts_mlp_lora``, ``experts_mlp_quantized``,
            ``experts_merged`` or ``experts_neurons``.
        impl: the implementation that runs.
        reason: why, in one sentence.
        tokens: the number of tokens that the work is counted for.
        device: device type.
        dtype: of the computation.
        candidates: every implementation, with its counted work.
        packed_bytes: size of the expert weights where ``prepack()`` packed them; 0 in home form.
        configuration: how the GPU kernels cut the work there, for as many tokens; empty for another implementation, or for a
            GPU that is not here to ask.
    """

    operator: str
    impl: str
    reason: str
    tokens: int
    device: str
    dtype: torch.dtype
    candidates: tuple[Candidate, ...]
    packed_bytes: int = 0
    configuration: str = ""

    def __str__(self) -> str:
        lines = [f"{self.operator} on {self.device}, {str(self.dtype).removeprefix('torch.')}, {self.tokens} tokens: "]
        lines[0] += f"impl = {self.impl!r} ({self.reason})"
        for c in self.candidates:
            figures = f"{c.work.flops / 1e9:10.3f} GFLOP {c.work.weight_bytes / 1e6:10.2f} MB of expert weights"
            note = f"  cannot run: {c.refusal}" if c.refusal else ""
            lines.append(f"  {'*' if c.impl == self.impl else ' '} {c.impl:8s} {figures}{note}")
        if self.configuration:
            lines.append(f"  {self.configuration}")
        if self.packed_bytes:
            lines.append(f"  packed for inference: {self.packed_bytes / 1e6:.2f} MB, the expert weights themselves")
        return "\n".join(lines)


def explain(
    layer: MoE | Experts | QuantizedExperts | FusedOneMoE | FineGrainedMoE | MoEConfig,
    x: Tensor | None = None,
    *,
    tokens: int = 512,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Tell which implementation a layer uses, why, and what each would cost.

    Args:
        layer: a module, or the configuration of one.
        x: an input ``[..., D]``; its token count, dtype and device are used.
        tokens: ``T`` to count work for, when there is no ``x``. The choice itself never depends on it.
        dtype: when there is neither ``x`` nor a module to take it from (default float32).
        device: when there is neither (default cpu).

    Returns:
        The :class:`Explanation`.

    Raises:
        TypeError: ``layer`` is none of the above.
        ValueError: the layer names an ``impl`` that cannot run there.

    Example:
        >>> from fusedonemoe import MoEConfig, explain
        >>> config = MoEConfig(hidden_size=64, intermediate_size=32, num_experts=16, top_k=2, impl="grouped")
        >>> print(explain(config, tokens=100, device="cuda"))
        experts_mlp on cuda, float32, 100 tokens: impl = 'grouped' (asked for by impl=)
            dense         0.020 GFLOP       0.39 MB of expert weights
          * grouped       0.002 GFLOP       0.39 MB of expert weights
            cpu           0.002 GFLOP       0.39 MB of expert weights  cannot run: the CPU kernels do not run on device 'cuda'
            triton        0.002 GFLOP       0.39 MB of expert weights...
    """
    widths: tuple[int, ...]
    transposed = False
    if isinstance(layer, FusedOneMoE):
        operator, impl = "experts_merged", layer.impl
        E, D, F = layer.proj.shape
        K = layer.gate.top_k or E
        widths, weight_numel, gated = (D, F), layer.proj.numel(), False
    elif isinstance(layer, FineGrainedMoE):
        operator, impl = "experts_neurons", layer.impl
        (E, D), F = layer.down_embed.shape, 1
        K = layer.gate.num_heads * layer.gate.top_k
        widths, weight_numel, gated = (), 2 * E * D, False
    elif isinstance(layer, (MoE, Experts, QuantizedExperts, MoEConfig)):
        config = layer if isinstance(layer, MoEConfig) else layer.config
        operator, impl = "experts_mlp", config.impl
        E, K = config.num_experts, config.experts_per_token
        D, F, G = config.hidden_size, config.intermediate_size, config.up_rows
        widths, weight_numel, gated = (D, G, F), E * D * (G + F), config.gated
        transposed = config.transposed
    else:
        expected = "MoE, Experts, QuantizedExperts, FusedOneMoE, FineGrainedMoE or MoEConfig"
        raise TypeError(f"layer must be a {expected}, got {type(layer).__name__}")
    experts = layer.experts if isinstance(layer, MoE) else layer
    if isinstance(experts, LoRAExperts):
        # Merged, it is the plain layer again.
        operator, impl = operator if experts.merged else "experts_mlp_lora", experts.form.impl
    if isinstance(experts, QuantizedExperts):
        operator = "experts_mlp_quantized"
    like = x if x is not None else next(layer.parameters()) if isinstance(layer, torch.nn.Module) else None
    dtype = dtype or (torch.float32 if like is None else like.dtype)
    device_type = torch.device(device or ("cpu" if like is None else like.device)).type
    tokens = tokens if x is None else x.numel() // D
    parameters = layer.parameters() if isinstance(layer, torch.nn.Module) else ()
    contiguous = all(p.is_contiguous() for p in parameters) and not transposed
    place: dict[str, Any] = {"device_type": device_type, "dtype": dtype, "contiguous": contiguous}
    if tables := operator == "experts_neurons":
        chosen = choose_tables(impl, **place)
    else:
        chosen = choose(operator, impl, top_k=K, num_experts=E, widths=widths, **place)
    itemsize = experts.nbytes / weight_numel if isinstance(experts, QuantizedExperts) else dtype.itemsize

    def candidate(name: str) -> Candidate:
        # Of tables the portable form gathers the rows that are asked for, and pads nothing.
        counted = "grouped" if tables and name == "portable" else name
        work = count_work(counted, tokens=tokens, top_k=K, num_experts=E, weight_numel=weight_numel, itemsize=itemsize)
        if tables and name == "grouped":  # it has no grouped product that could be refused
            return Candidate(name, work, None)
        return Candidate(name, work, refusal(name, widths=widths, operator=operator, **place))

    packed_bytes = experts.packed_bytes if isinstance(experts, Experts) else 0
    configuration = ""
    # The tiles of quantised weights are cut further, to groups, and tables have none.
    described = operator not in ("experts_mlp_quantized", "experts_neurons")
    if described and chosen.impl == "triton" and (arch := architecture(torch.device(device or device_type))):
        configuration = describe(arch, dtype, tokens * K, E, D, F, gated, inference=operator == "experts_mlp")
    candidates = tuple(map(candidate, IMPLEMENTATIONS))
    return Explanation(operator, chosen.impl, chosen.reason, tokens, device_type, dtype, candidates, packed_bytes, configuration)
