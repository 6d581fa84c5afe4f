"""Experts with weights of 8 or 4 bits."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.checks import check_one_of
from fusedonemoe.config import MoEConfig
from fusedonemoe.functional.quantized import FORMATS, check_finite, check_group_size, new_weight
from fusedonemoe.layers.kept_buffers import KeptBuffers
from fusedonemoe.layers.moe import Experts
from fusedonemoe.layers.panels import home_of
from fusedonemoe.ops.options import ACTIVATION_OPTIONS, options_of

_PARTS = ("", "_scale", "_zero_point")  # of a name, in the order of a QuantizedWeight


def unwrapped(name: str, weight: Tensor) -> F.QuantizedWeight | None:
    """The plain tensors inside a quantised tensor of torchao; None for a plain weight."""
    if type(weight) in (Tensor, nn.Parameter):
        return None
    kind: Any = type(weight)
    if not (kind.__name__ == "Int8Tensor" and kind.__module__.startswith("torchao.")):
        raise TypeError(f"{name} must be a plain tensor or torchao's Int8Tensor, got {kind.__module__}.{kind.__name__}")
    inside: Any = weight
    values, scale = inside.qdata, inside.scale
    if tuple(scale.shape) != (expected := (*values.shape[:2], 1)):
        raise ValueError(f"{name} must have one scale per output, of shape {expected}, got {tuple(scale.shape)}")
    if inside.act_quant_kwargs is not None or inside.act_pre_scale is not None:
        raise ValueError(f"{name} must be quantised weight-only, but its Int8Tensor quantises or scales activations, too")
    if inside.zero_point is not None and bool((inside.zero_point != 0).any()):
        raise ValueError(f"{name} must be quantised symmetrically, but its Int8Tensor has zero points")
    return F.QuantizedWeight(values.contiguous(), scale.squeeze(-1).to(torch.float32).contiguous())


def rows_of(experts: Experts, name: str) -> Tensor:
    """Return a module's weight as ``[E, O, I]``, transposed or packed as it may be."""
    weight = home_of(experts, name)
    if not experts.config.transposed:
        return weight
    if unwrapped(name, weight) is not None:
        raise ValueError(
            f"{name} must be kept as [E, O, I] where it is torchao's Int8Tensor, but the configuration has transposed=True"
        )
    return weight.transpose(1, 2)


def source_of(experts: Experts, name: str, dtype: str) -> tuple[Tensor, F.QuantizedWeight | None]:
    """Return a weight ``[E, O, I]`` that can become one of ``dtype``, and the tensors inside where it is quantised already."""
    if experts.exchange is not None:
        raise ValueError("experts must all be held by this process to be quantised, but an exchange brings rows to others")
    weight = rows_of(experts, name)
    inside = unwrapped(name, weight)
    if inside is None:
        check_finite(name, weight)
    elif dtype != "int8":
        raise ValueError(f"dtype must be 'int8' for {name}, which is torchao's Int8Tensor already, got {dtype!r}")
    return weight, inside


class QuantizedExperts(KeptBuffers):
    """The experts of a block with weights of 8 or 4 bits, in plain buffers.

    In place of the parameters of :class:`Experts` of the same names there are buffers with their values, int8 ``[E, O, I]``
    or uint8 ``[E, O, I / 2]``, and beside each ``*_scale``, float32 ``[E, O]`` or ``[E, O, I / group_size]``, and for
    asymmetric int4 ``*_zero_point``. Biases stay parameters. Casting the module casts the biases only.

    Args:
        config: of the block.
        dtype: ``"int8"`` or ``"int4"``.
        group_size: inputs that share a scale: 32, 64 or 128. For int4 only.
        symmetric: whether there are no zero points. For int4 only.
        bias_dtype: of the biases.

    Raises:
        ValueError: an unknown dtype, or sizes that do not divide into groups.

    Example:
        >>> import torch
        >>> from fusedonemoe import Experts, MoEConfig, QuantizedExperts
        >>> experts = Experts(MoEConfig(hidden_size=64, intermediate_size=32, num_experts=4, top_k=2))
        >>> QuantizedExperts.from_experts(experts, "int4", group_size=32).gate_up_proj.shape
        torch.Size([4, 64, 32])
    """

    down_proj_bias: Tensor | None
    fixed_buffers: ClassVar[tuple[str, ...]] = tuple(
        name + part for name in ("gate_up_proj", "up_proj", "down_proj") for part in _PARTS
    )

    def __init__(
        self,
        config: MoEConfig,
        dtype: str = "int8",
        *,
        group_size: int = 128,
        symmetric: bool = True,
        device: torch.device | str | None = None,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_one_of("dtype", dtype, FORMATS)
        self.config = config
        self.num_experts: int = config.num_experts
        self.dtype: str = dtype
        self.group_size: int = group_size
        self.symmetric: bool = symmetric
        self._up_name = "gate_up_proj" if config.gated else "up_proj"
        where = torch.device(device or torch.get_default_device())
        E, D, F_, G = config.num_experts, config.hidden_size, config.intermediate_size, config.up_rows
        for name, rows, width in ((self._up_name, G, D), ("down_proj", D, F_)):
            if dtype == "int4":
                check_group_size(group_size, width, name)
            weight = new_weight((E, rows, width), dtype, group_size, symmetric, where)
            for part, tensor in zip(_PARTS, weight, strict=True):
                self.register_buffer(name + part, tensor)

        def bias(*shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=bias_dtype)) if config.bias else None

        self.register_parameter(f"{self._up_name}_bias", bias(E, G))
        self.register_parameter("down_proj_bias", bias(E, D))

    @classmethod
    def from_experts(
        cls, experts: Experts, dtype: str = "int8", *, group_size: int = 128, symmetric: bool = True
    ) -> "QuantizedExperts":
        """Quantise the weights of a module, on their device; biases are taken over.

        Weights that are torchao's Int8Tensor, quantised weight-only, are unwrapped as they are.

        Raises:
            TypeError, ValueError: another module, weights of an unknown tensor class, or such as cannot be quantised so.
        """
        if not isinstance(experts, Experts):
            raise TypeError(f"experts must be an Experts module, got {type(experts).__name__}")
        check_one_of("dtype", dtype, FORMATS)
        options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric}
        module = cls(experts.config, dtype, device="meta", **options)
        for name in (module._up_name, "down_proj"):
            weight, inside = source_of(experts, name, dtype)
            quantized = inside or F.quantize_weight(weight, dtype, **options)
            for part, tensor in zip(_PARTS, quantized, strict=True):
                module._buffers[name + part] = tensor
            module._parameters[f"{name}_bias"] = getattr(experts, f"{name}_bias")
        return module.train(experts.training)

    def quantized_weights(self) -> tuple[F.QuantizedWeight, F.QuantizedWeight]:
        """Both weights, as :func:`fusedonemoe.functional.experts_mlp_quantized` reads them."""
        up, down = (F.QuantizedWeight(*(getattr(self, name + part) for part in _PARTS)) for name in (self._up_name, "down_proj"))
        return up, down

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Run each row of ``x`` through its experts and sum by weight."""
        options = options_of(self.config, (*ACTIVATION_OPTIONS, "save_percent", "impl"))
        options |= {"gate_up_bias": getattr(self, f"{self._up_name}_bias"), "down_bias": self.down_proj_bias}
        return F.experts_mlp_quantized(x, experts, weights, *self.quantized_weights(), **options)

    def prepack(self) -> None:
        """There is nothing to pack: the kernels read quantised weights as they are stored."""

    def unpack(self) -> None:
        """There is nothing to unpack."""

    @property
    def nbytes(self) -> int:
        """Bytes of both weights, with scales and zero points."""
        return sum(weight.nbytes for weight in self.quantized_weights())

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        sizes = options_of(self.config, ("num_experts", "hidden_size", "intermediate_size"))
        sizes |= options_of(self, ("dtype",) if self.dtype == "int8" else ("dtype", "group_size", "symmetric"))
        return ", ".join(f"{name}={value!r}" for name, value in sizes.items())
