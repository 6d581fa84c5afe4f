"""The form of a module of experts, which adapters read it by."""

from dataclasses import dataclass

from torch import nn

from fusedonemoe.layers.moe import Experts
from fusedonemoe.ops.options import ACTIVATION_OPTIONS, ActivationFields, options_of


@dataclass(frozen=True, kw_only=True)
class ExpertsForm(ActivationFields):
    """The form of a module of experts: the names of its parameters, and their computation.

    Attributes:
        up: name of the up-projection's parameter, ``[E, G, D]``, or ``[E, D, G]`` when ``transposed``.
        down: name of the down-projection's parameter, ``[E, D, F]`` or ``[E, F, D]``.
        up_bias: name of the up-projection's bias ``[E, G]``, or None.
        down_bias: name of the down-projection's bias ``[E, D]``, or None.
        transposed: this and all other fields are arguments of :func:`fusedonemoe.functional.experts_mlp_lora`.

    Example:
        >>> ExpertsForm(up="w13", down="w2").activation
        'silu'
    """

    up: str = "gate_up_proj"
    down: str = "down_proj"
    up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    save_percent: int = 100
    impl: str = "auto"

    def name(self, target: str) -> str:
        """The name of a target's parameter."""
        return self.up if target == "gate_up" else self.down


def form_of(experts: nn.Module) -> ExpertsForm | None:
    """Return the form of an :class:`Experts`; None for another module."""
    if not isinstance(experts, Experts):
        return None
    config, up = experts.config, "gate_up_proj" if experts.config.gated else "up_proj"
    return ExpertsForm(
        up=up,
        up_bias=f"{up}_bias" if config.bias else None,
        down_bias="down_proj_bias" if config.bias else None,
        **options_of(config, (*ACTIVATION_OPTIONS, "transposed", "save_percent")),
        # The compiled CPU kernels have no adapters.
        impl="auto" if config.impl == "cpu" else config.impl,
    )
