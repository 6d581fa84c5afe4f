"""MXFP4: 32 values of four bits under one shared exponent, as GPT-OSS's released weights are stored."""

import torch
from torch import Tensor

# E2M1: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127  # of the shared E8M0 exponent
_NOT_A_NUMBER = 255  # the one E8M0 code that is no exponent


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``value[i] * 2 ** (scale - 127)``.

    Args:
        blocks: ``[..., C / 32, 16]`` uint8, two values in each byte, the even one in the lower half.
        scales: ``[..., C / 32]`` uint8 exponents.
        dtype: of the result; bfloat16 and float32 hold every value exactly, down to the subnormal end of bfloat16's range.

    Returns:
        ``[..., C]``.

    Source:
        OCP Microscaling Formats (MX) specification 1.0, sections 5.3 and 6.3.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=compute, device=blocks.device)
    nibbles = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    exponent = scales.to(torch.int32) - _EXPONENT_BIAS
    # Two factors, each a normal float32: 2 ** -127 is none.
    half = exponent.div(2, rounding_mode="floor")
    wide = values[nibbles.to(torch.int32)]
    wide = wide * torch.exp2(half.to(compute))[..., None] * torch.exp2((exponent - half).to(compute))[..., None]
    wide = wide.masked_fill_((scales == _NOT_A_NUMBER)[..., None], float("nan"))
    return wide.flatten(-2).to(dtype)
