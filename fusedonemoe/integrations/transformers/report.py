"""The report of :func:`apply`: the change of each mixture-of-experts layer, and the reasons for what it left."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One mixture-of-experts layer.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        kind: its class.
        uses: whether its experts are computed by this library.
        experts: how they are: which activation is fused, or what runs unfused; why not, where ``uses`` is False.
        router: how its router runs: which rule is fused, or why its own forward still runs.
        router_fused: whether this library routes.
    """

    name: str
    kind: str
    uses: bool
    experts: str
    router: str = ""
    router_fused: bool = False


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`apply`, one entry for each mixture-of-experts layer; ``print`` it.

    Attributes:
        layers: in the order of the model.

    Example:
        >>> from fusedonemoe.integrations.transformers import LayerReport, Report
        >>> fused = LayerReport("layers.0.mlp.experts", "Experts", True, "silu, fused", "softmax, top 2, fused", True)
        >>> other = LayerReport("layers.1.mlp.experts", "Others", False, "it does not ask the registry")
        >>> print(Report((fused, other)))
        1 of 2 MoE layers use fusedonemoe.
          1 x Experts: silu, fused; router: softmax, top 2, fused
        Not used by:
          layers.1.mlp.experts (Others): it does not ask the registry
    """

    layers: tuple[LayerReport, ...]

    @property
    def total(self) -> int:
        """``M``: how many mixture-of-experts layers the model has."""
        return len(self.layers)

    @property
    def used(self) -> int:
        """``N``: how many of them this library computes."""
        return sum(layer.uses for layer in self.layers)

    @property
    def routers_fused(self) -> int:
        """In how many of them it routes too."""
        return sum(layer.router_fused for layer in self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "0 MoE layers found: there is nothing to replace in this model."
        lines = [f"{self.used} of {self.total} MoE layers use fusedonemoe."]
        alike = Counter(f"{layer.kind}: {layer.experts}; router: {layer.router}" for layer in self.layers if layer.uses)
        lines += [f"  {count} x {text}" for text, count in alike.items()]
        if others := [layer for layer in self.layers if not layer.uses]:
            lines += ["Not used by:", *(f"  {layer.name} ({layer.kind}): {layer.experts}" for layer in others)]
        return "\n".join(lines)
