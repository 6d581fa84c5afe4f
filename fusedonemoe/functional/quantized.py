"""Expert weights of 8 and 4 bits, and the layer over them."""

import torch
from torch import Tensor

from fusedonemoe import checks
from fusedonemoe.functional.calls import as_rows, check_biases, choose_impl, intermediate_size, records_gradients, with_leading
from fusedonemoe.ops import formats, library
from fusedonemoe.ops.derivatives import refuse_transforms
from fusedonemoe.ops.formats import GROUP_SIZES, QUANTIZED, QuantizedWeight
from fusedonemoe.ops.options import make_activation
from fusedonemoe.ops.records import Projection

_ops = torch.ops.fusedonemoe
FORMATS = tuple(each.name for each in QUANTIZED)


def new_weight(
    shape: tuple[int, int, int], dtype: str, group_size: int, symmetric: bool, device: torch.device
) -> QuantizedWeight:
    """Return the tensors of a weight ``[E, O, I]``, uninitialised."""
    made = formats.FORMATS[dtype].empty(shape, device, group_size=group_size, symmetric=symmetric)
    assert isinstance(made, QuantizedWeight)
    return made


def check_group_size(group_size: int, width: int, name: str) -> None:
    """Rows of this width divide into groups."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    if width % group_size:
        raise ValueError(
            f"{name} must have rows of a multiple of group_size={group_size} inputs for int4, got {width}; int8 takes any number"
        )


def check_finite(name: str, weight: Tensor) -> None:
    """No infinities, no NaNs."""
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name} must be finite to be quantised, got infinities or NaNs")


def quantize_weight(weight: Tensor, dtype: str = "int8", *, group_size: int = 128, symmetric: bool = True) -> QuantizedWeight:
    """Round stacked weights to 8 or 4 bits: ``weight ~ scale * (values - zero_point)``.

    Args:
        weight: ``[E, O, I]``, O outputs of I inputs; float64, float32, bfloat16 or float16.
        dtype: ``"int8"``, one scale for every output: 127 is the largest of the row. ``"int4"``, one scale for every
            ``group_size`` inputs of an output.
        group_size: 32, 64 or 128, which has to divide I. For int4 only.
        symmetric: for int4: a stored 8 means 0 and the largest of a group has a value of its own; otherwise the 16 values of
            a group reach from its smallest to its largest element, and its zero point is stored.

    Returns:
        :class:`QuantizedWeight`: about half the bytes of bfloat16 for int8, and 0.27 to 0.33 of them for int4.

    Raises:
        TypeError, ValueError: a weight of another dtype or shape, rows that do not divide into groups, or infinities or NaNs.

    Source:
        ``int4`` symmetric: the "Q4_0" rule of ggml.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> weight = torch.randn(4, 32, 64)
        >>> quantized = F.quantize_weight(weight, "int4", group_size=32)
        >>> quantized.values.shape, quantized.scale.shape
        (torch.Size([4, 32, 32]), torch.Size([4, 32, 2]))
        >>> bool((F.dequantize_weight(quantized) - weight).abs().max() < 0.6)
        True
    """
    checks.check_float("weight", weight)
    checks.check_one_of("dtype", dtype, FORMATS)
    checks.check_dim("weight", weight, "E, O, I")
    if dtype == "int4":
        check_group_size(group_size, weight.shape[2], "weight")
    check_finite("weight", weight)
    E, rows, width = weight.shape
    made = new_weight((E, rows, width), dtype, group_size, symmetric, weight.device)
    for expert, like in enumerate(weight.detach().split(1)):  # one after the other: rounding takes several float32 copies
        rounded = formats.FORMATS[dtype].make(like, group_size=group_size, symmetric=symmetric)
        for whole, part in zip(made, rounded, strict=True):
            if whole is not None and part is not None:
                whole[expert].copy_(part[0])
    return made


def _check_quantized(name: str, weight: QuantizedWeight) -> None:
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name} must be a QuantizedWeight, as F.quantize_weight makes it, got {type(weight).__name__}")
    values, scale, zero_point = weight
    checks.check_tensor(f"{name}.values", values)
    checks.check_tensor(f"{name}.scale", scale)
    if values.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{name}.values must be int8, or uint8 with two values in each, got {values.dtype}")
    checks.check_dim(f"{name}.values", values, "E, O, I" if values.dtype == torch.int8 else "E, O, I / 2")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}.scale must be float32, got {scale.dtype}")
    checks.check_same_device(f"{name}.scale", scale, f"{name}.values", values.device)
    if values.dtype == torch.int8:
        checks.check_shape(f"{name}.scale", scale, tuple(values.shape[:2]))
        if zero_point is not None:
            raise ValueError(f"{name}.zero_point must be None beside int8 values, got shape {tuple(zero_point.shape)}")
        return
    checks.check_dim(f"{name}.scale", scale, "E, O, groups")
    E, O, I = weight.shape  # noqa: E741
    sizes = {size: (E, O, I // size) for size in GROUP_SIZES if I % size == 0}
    if tuple(scale.shape) not in sizes.values():
        expected = " or ".join(map(str, sizes.values())) or f"[E, O, I / group_size], and {I} inputs have no such groups"
        raise ValueError(f"{name}.scale must have shape {expected}, got {tuple(scale.shape)}")
    if zero_point is not None:
        checks.check_tensor(f"{name}.zero_point", zero_point)
        if zero_point.dtype != torch.uint8:
            raise TypeError(f"{name}.zero_point must be uint8, got {zero_point.dtype}")
        checks.check_shape(f"{name}.zero_point", zero_point, tuple(scale.shape))
        checks.check_same_device(f"{name}.zero_point", zero_point, f"{name}.values", values.device)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights ``[E, O, I]`` that a :class:`QuantizedWeight` stands for.

    Args:
        weight: of :func:`quantize_weight`.
        dtype: of the result; computed in float32, or float64 where that is asked for, and rounded once.

    Raises:
        TypeError, ValueError: another argument, or parts that do not fit each other.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> weight = torch.tensor([[[1.0, -0.5, 0.25]]])
        >>> F.dequantize_weight(F.quantize_weight(weight)).sub(weight).abs().max() < 1 / 254
        tensor(True)
    """
    _check_quantized("weight", weight)
    return Projection.of(QUANTIZED, weight).format.widen(weight, dtype)


def experts_mlp_quantized(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: QuantizedWeight,
    down_proj: QuantizedWeight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    gate_up_layout: str = "gate_up",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    save_percent: int = 100,
    impl: str = "auto",
) -> Tensor:
    """Run :func:`experts_mlp` over weights of 8 or 4 bits; what is not said here is as there.

    Gradients reach x, the routing weights and the biases; quantised weights are constants. Sums are float32. The kernels
    read the weights as they are stored and widen them in registers; on CPU a token's output has the same bits whatever else
    is in the batch and however many threads run.

    Args:
        gate_up_proj: of ``[E, 2F, D]``, or ``[E, F, D]`` when plain.
        down_proj: of ``[E, D, F]``, with as many bits.
        impl: ``"cpu"``, ``"triton"``, ``"grouped"`` or ``"dense"`` (these two widen all weights to the dtype of x, float32 for
            float16, for the time of the call), or ``"auto"``: the kernels where there are some, else grouped.

    Raises:
        RuntimeError: a gradient of a scale is asked for.

    Example:
        >>> import torch
        >>> from fusedonemoe import functional as F
        >>> gate_up_proj, down_proj = torch.randn(4, 2 * 32, 16), torch.randn(4, 16, 32)
        >>> quantized = F.quantize_weight(gate_up_proj), F.quantize_weight(down_proj)
        >>> x, experts, weights = torch.randn(5, 16), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
        >>> F.experts_mlp_quantized(x, experts, weights, *quantized).shape
        torch.Size([5, 16])
    """
    act = make_activation(activation, gated, gate_up_layout, swiglu_alpha, swiglu_limit)
    checks.check_save_percent(save_percent)
    checks.check_routing(x, experts, weights)
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        _check_quantized(name, weight)
        checks.check_same_device(f"{name}.values", weight.values, "x", x.device)
    E, G, D = gate_up_proj.shape
    F = intermediate_size(E, G, gated)
    checks.check_fits(x, D, "gate_up_proj")
    if down_proj.shape != (E, D, F):
        raise ValueError(f"down_proj must be of shape {(E, D, F)}, got {down_proj.shape}")
    up_kind, down_kind = ((weight.bits, weight.bits == 4 and weight.group_size) for weight in (gate_up_proj, down_proj))
    if up_kind != down_kind:
        raise ValueError(
            f"down_proj must have the bits and the group size of gate_up_proj ({gate_up_proj.bits}, {gate_up_proj.group_size}), "
            f"got {down_proj.bits}, {down_proj.group_size}"
        )
    check_biases(x, gate_up_bias, down_bias, (E, G, D))
    read = [tensor for weight in (gate_up_proj, down_proj) for tensor in weight if tensor is not None]
    chosen = choose_impl("experts_mlp_quantized", impl, x, experts, (D, G, F), *read)
    flat = (as_rows(x), as_rows(experts), as_rows(weights))
    parameters = (*gate_up_proj, *down_proj, gate_up_bias, down_bias)
    if chosen == "dense":
        y = _ops.experts_mlp_quantized_dense(*flat, *parameters, *act, library.BUILD)
    else:
        refuse_transforms()
        recording = records_gradients(x, weights, *parameters)
        if chosen == "cpu" and not recording:
            y = library.experts_mlp_quantized_inference(*flat, *parameters, *act, library.BUILD)
        else:
            kept = save_percent if recording else 0
            y = library.experts_mlp_quantized(*flat, *parameters, *act, kept, library.BUILD, chosen)[0]
    return with_leading(y, x)
