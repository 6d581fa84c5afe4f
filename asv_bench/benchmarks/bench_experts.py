"""Experts of dense weights: the gated MLP, its packed form, and the merged up-projection."""

from functools import partial

import torch

from fusedonemoe import functional as F
from fusedonemoe import testing

from .subjects import DEVICES, Subject, _Both, _Forward, _Operator, needs, parse, present


def _mlp(device: str, case: str):
    impl, shape, dtype = parse(case)
    return impl, testing.make_mlp_inputs(*shape, dtype=dtype, routing="distinct", device=device)


class _MLP:
    """``[experts_mlp]`` with silu and gate, as Qwen3, Mixtral and OLMoE have it."""

    def subject(self, device, case):
        impl, i = _mlp(device, case)

        def call(x, weights, up, down, impl=impl):
            return F.experts_mlp(x, i.experts, weights, up, down, impl=impl)

        return Subject(
            call, (i.x, i.weights, i.up_proj, i.down_proj), partial(call, impl="grouped" if device == "cpu" else "dense")
        )


class MLP(_MLP, _Operator):
    params = (DEVICES, ("auto E32 float32", "auto E32 bfloat16", "cpu E32 float16", "grouped E32 float32", "dense E32 float32"))


class MLPBlocks(_MLP, _Both):
    """Many experts, blocks of known models, a few tokens, and the overhead of a call."""

    params = (
        DEVICES,
        (
            "auto E128 bfloat16",
            "auto E1024 bfloat16",
            "auto qwen3-30b bfloat16",
            "auto mixtral bfloat16",
            "auto decode bfloat16",
            "auto call float32",
        ),
    )


class MLPPacked(_Forward):
    """Inference from packed weights."""

    params = (("cpu",), ("auto qwen3-30b bfloat16", "auto decode bfloat16"))

    def subject(self, device, case):
        pack_experts = present("functional.pack_experts")
        needs(F.experts_mlp, "packed")
        _, i = _mlp(device, case)
        packed = pack_experts(i.up_proj, i.down_proj)
        # At earlier commits the function took the weights and their packed copy.
        home = () if hasattr(packed, "unpack") else (i.up_proj, i.down_proj)

        def call(x, weights):
            return F.experts_mlp(x, i.experts, weights, *home, packed=packed)

        return Subject(call, (i.x, i.weights))


class Merged(_Operator):
    """``[experts_merged]``, the up-projection of the original."""

    params = (DEVICES, ("auto E32 float32", "auto E32 bfloat16", "grouped E32 float32", "dense E32 float32"))

    def subject(self, device, case):
        impl, shape, dtype = parse(case)
        i = testing.make_merged_inputs(*shape, dtype=dtype, routing="distinct", device=device)

        def call(x, weights, proj, impl=impl):
            return F.experts_merged(x, i.experts, weights, proj, impl=impl)

        return Subject(call, (i.x, i.weights, i.proj), partial(call, impl="dense"))


class MergedBlocks(_Both):
    params = (DEVICES, ("auto E1024 bfloat16", "auto call float32"))
    subject = Merged.subject


class Adapters(_Operator):
    """``[experts_mlp_lora]``, rank 8 on both projections; the experts are frozen."""

    params = (DEVICES, ("auto E32 float32", "auto E32 bfloat16"))

    def subject(self, device, case):
        experts_mlp_lora = present("functional.experts_mlp_lora")
        impl, i = _mlp(device, case)
        E, G, D = i.up_proj.shape
        draw = torch.Generator().manual_seed(1)

        def factor(*shape):
            return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).to(device, i.x.dtype)

        factors = factor(E, 8, D), factor(E, G, 8), factor(E, 8, G // 2), factor(E, D, 8)

        def call(x, weights, up_A, up_B, down_A, down_B, impl=impl):
            frozen = i.up_proj.to(x.dtype), i.down_proj.to(x.dtype)
            named = {"gate_up_A": up_A, "gate_up_B": up_B, "down_A": down_A, "down_B": down_B}
            return experts_mlp_lora(x, i.experts, weights, *frozen, **named, impl=impl)

        return Subject(call, (i.x, i.weights, *factors), partial(call, impl="dense"))


class Quantized(_Operator):
    """``[experts_mlp_quantized]``; the error is that of the arithmetic, without the rounding of the weights."""

    params = (DEVICES, ("int8 E32 float32", "int8 E32 bfloat16", "int4 E32 bfloat16"))

    def subject(self, device, case):
        experts_mlp_quantized = present("functional.experts_mlp_quantized")
        bits, i = _mlp(device, case)
        quantized = [F.quantize_weight(weight, bits) for weight in (i.up_proj, i.down_proj)]

        def call(x, weights, impl="auto"):
            return experts_mlp_quantized(x, i.experts, weights, *quantized, impl=impl)

        return Subject(call, (i.x, i.weights), partial(call, impl="dense"))


class Quantize:
    """Rounding the weights of a block."""

    params = (DEVICES, ("int8", "int4"))
    param_names = ("device", "format")
    rounds = 1
    repeat = (2, 8, 0.3)

    def setup(self, device, bits):
        self.quantize = present("functional.quantize_weight")
        self.weight = torch.randn(16, 1536, 2048, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    def time_quantize(self, device, bits):
        self.quantize(self.weight, bits)
        if device == "cuda":
            torch.cuda.synchronize()
