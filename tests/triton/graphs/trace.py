"""What torch.compile makes of the public functions on a GPU that is not there, printed as JSON.

Run as a process of its own, ``python -m tests.triton.graphs.trace CASE``: the library that lets autograd's engine work on fake
CUDA tensors has to be loaded before torch.
"""

# ruff: noqa: E402
from tests.triton import fake_cuda

fake_cuda.load()

import inspect
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusedonemoe import functional
from tests.triton.fake_gpu import fake_gpu

D, F, E, K = 256, 128, 16, 4
TOKENS = (64, 100, 7, 2, 3000)  # 0 and 1 are graphs of their own: torch always specialises on them
FEW_TOKENS = (4, 100, 2)  # traced with T * K <= E
# Views and allocations, which launch nothing.
FREE = re.compile(
    r"((new_)?empty(_like|_strided)?|view|_unsafe_view|reshape|t|transpose|permute|slice|select|(un)?squeeze|expand|detach|alias|as_strided|unbind|split"
    r"|sym_(size|stride|numel))\."
)


class MLP(nn.Module):
    """The gated layer in GPT-OSS's form: biases, and weights that are transposed views."""

    def __init__(self) -> None:
        super().__init__()
        options: Any = {"dtype": torch.bfloat16, "device": "cuda"}
        self.up = nn.Parameter(torch.empty(E, D, 2 * F, **options))
        self.down = nn.Parameter(torch.empty(E, F, D, **options))
        self.up_bias = nn.Parameter(torch.empty(E, 2 * F, **options))
        self.down_bias = nn.Parameter(torch.empty(E, D, **options))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = functional.route(logits, top_k=K)
        return functional.experts_mlp(
            x,
            experts,
            weights,
            self.up,
            self.down,
            gate_up_bias=self.up_bias,
            down_bias=self.down_bias,
            gate_up_layout="interleaved",
            activation="swiglu_oai",
            transposed=True,
            impl="triton",
        )


class LoRA(MLP):
    """The gated MLP, frozen, with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        shapes = {"gate_up_A": (E, 8, D), "gate_up_B": (E, 2 * F, 8), "down_A": (E, 8, F), "down_B": (E, D, 8)}
        options: Any = {"dtype": torch.bfloat16, "device": "cuda"}
        self.factors = nn.ParameterDict({name: torch.empty(shape, **options) for name, shape in shapes.items()})

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = functional.route(logits, top_k=K)
        return functional.experts_mlp_lora(
            *(x, experts, weights, self.up, self.down),
            **self.factors,
            gate_up_bias=self.up_bias,
            down_bias=self.down_bias,
            gate_up_layout="interleaved",
            activation="swiglu_oai",
            transposed=True,
            impl="triton",
        )


class Quantized(MLP):
    """The gated MLP over 4-bit weights with zero points."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        for name, outputs, inputs in (("up", 2 * F, D), ("down", D, F)):
            for part, width, dtype in (
                ("values", inputs // 2, torch.uint8),
                ("scale", inputs // 32, torch.float32),
                ("zero_point", inputs // 32, torch.uint8),
            ):
                self.register_buffer(f"{name}_{part}", torch.empty(E, outputs, width, dtype=dtype, device="cuda"))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = functional.route(logits, top_k=K)
        return functional.experts_mlp_quantized(
            *(x, experts, weights),
            functional.QuantizedWeight(self.up_values, self.up_scale, self.up_zero_point),
            functional.QuantizedWeight(self.down_values, self.down_scale, self.down_zero_point),
            gate_up_bias=self.up_bias,
            down_bias=self.down_bias,
            gate_up_layout="interleaved",
            activation="swiglu_oai",
            impl="triton",
        )


class Merged(nn.Module):
    """The merged up-projection behind a sigmoid router."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.empty(E, D, F, dtype=torch.bfloat16, device="cuda"))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = functional.route(logits, top_k=K, scoring="sigmoid", norm_topk_prob=False)
        return functional.experts_merged(x, experts, weights, self.proj, impl="triton")


class Route(nn.Module):
    """The router alone."""

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return functional.route(logits, top_k=K)[0]


class Neurons(nn.Module):
    """Product keys and experts of one neuron each."""

    def __init__(self) -> None:
        super().__init__()
        options: Any = {"dtype": torch.bfloat16, "device": "cuda"}
        self.down, self.up = (nn.Parameter(torch.empty(64, D, **options)) for _ in range(2))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = functional.route_product_key(logits.view(-1, 2, E // 2), top_k=K)
        return functional.experts_neurons(x, experts, weights, self.down, self.up, impl="triton")


class Values(nn.Module):
    """The value memory."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(E, D, dtype=torch.bfloat16, device="cuda"))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, experts = functional.route(logits, top_k=K)
        return functional.experts_values(experts, weights, self.table, impl="triton")


CASES: dict[str, type[nn.Module]] = {
    "route": Route,
    "experts_mlp": MLP,
    "inference": MLP,
    "decode": MLP,
    "experts_mlp_lora": LoRA,
    "experts_mlp_quantized": Quantized,
    "experts_merged": Merged,
    "experts_neurons": Neurons,
    "experts_values": Values,
}


WITHOUT_GRADIENTS = ("inference", "decode")


def _is_kernel(node: Node) -> bool:
    return "triton_kernel_wrapper" in str(node.target)


def _origin(node: Any) -> Any:
    """The node that made a tensor, seen through the kernels that wrote to it before and through views."""
    while isinstance(node, Node) and node.op == "call_function":
        name = str(node.target)
        if "getitem" in name and isinstance(node.args[0], Node) and _is_kernel(node.args[0]):
            node = node.args[0].kwargs["kwargs"][node.args[1]]  # type: ignore[index]
        elif any(f"aten.{view}." in name for view in ("view", "slice", "transpose", "alias", "reshape", "select")):
            node = node.args[0]
        else:
            break
    return node


def _numel(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) and isinstance(value.numel(), int) else 0


def describe(graph: GraphModule) -> dict[str, Any]:
    """Kernels, other operators, and what would copy an input, of one graph."""
    kernels, files, others, copied = [], set(), [], []
    read: set[Any] = set()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if _is_kernel(node):
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            function = kernel.fn
            while not inspect.isfunction(function):  # heuristics and autotuners wrap the jit function
                function = function.fn
            kernels.append(function.__name__)
            files.add(function.__code__.co_filename)
            # Inductor copies what a kernel writes to if it is an input of the graph, or if somebody has read it before.
            origins = {name: _origin(value) for name, value in node.kwargs["kwargs"].items() if isinstance(value, Node)}
            written = set(node.kwargs["tensors_to_clone"])
            copied += [
                f"{function.__name__} writes {name}, which is {origins[name]}"
                for name in sorted(written)
                if "empty" not in str(origins[name].target) or origins[name] in read
            ]
            read |= {origin for name, origin in origins.items() if name not in written}
            continue
        name = str(node.target).removeprefix("aten.")
        if "getitem" in name or name.startswith("<") or FREE.match(name):
            continue
        others.append(name)
        source = node.args[0] if node.args else None
        if name.split(".")[0] in ("clone", "_to_copy", "copy", "contiguous") and isinstance(source, Node):
            size = _numel(_origin(source))
            if size >= E * D * F:
                copied.append(f"{name} of {source} with {size} elements")
    return {"kernels": kernels, "files": sorted(files), "others": others, "copied": copied}


def trace(case: str, dynamic: bool) -> dict[str, Any]:
    """Compile a case and run it forward and, if it records gradients, backward for several numbers of tokens."""
    graphs: dict[str, list[dict[str, Any]]] = {"forward": [], "backward": []}

    def compiler(direction: str) -> Callable[..., Any]:
        def collect(graph: GraphModule, inputs: Any) -> Any:
            graphs[direction].append(describe(graph))
            return make_boxed_func(graph.forward)

        return collect

    torch._dynamo.reset()
    with fake_gpu("sm90"), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        module = CASES[case]()
        backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
        compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
        numbers = FEW_TOKENS if case == "decode" else TOKENS
        for tokens in numbers if dynamic else numbers[:1]:
            x = torch.empty(tokens, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            logits = torch.empty(tokens, E, device="cuda", requires_grad=True)
            if case == "experts_neurons":  # in a layer a parameter fixes the number of keys
                torch._dynamo.mark_static(logits, 1)
            if case in WITHOUT_GRADIENTS:
                with torch.no_grad():
                    compiled(x, logits)
            else:
                compiled(x, logits).sum().backward()
    return graphs


if __name__ == "__main__":
    print(json.dumps({str(dynamic): trace(sys.argv[1], dynamic) for dynamic in (False, True)}))
