"""FlashMoE's names and FineGrainedMoE against a search over every pair of keys in float64: values, gradients, checkpoints."""

from typing import Any

import pytest
import torch
from torch._dynamo.decorators import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fusedonemoe.compat.flashmoe import FlashMoE, FlashMoEConfig
from fusedonemoe.layers.fine_grained import FineGrainedMoE
from tests.exact import best, gradients, randn

B, S, D, FF, G, K = 2, 7, 12, 6, 5, 4
E = G * G
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": FF,
    "hidden_act": "silu",
    "num_experts": E,
    "num_experts_per_tok": K,
}
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PLAIN_ACTIVATIONS = {
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z / 2 * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": lambda z: z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
    "relu2": lambda z: z.clamp(min=0) ** 2,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}
THEIR_NAMES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "linear": "identity"}


def make(dtype=torch.float64, impl="auto", **changes):
    torch.manual_seed(0)
    layer = FlashMoE(FlashMoEConfig(**{**SIZES, **changes}), dtype=dtype, impl=impl)
    with torch.no_grad():
        layer.moe.gate.weight.mul_(3)
    return layer


def normalised(x_TD, norm, training):
    """BatchNorm without scale and shift, from the batch or from the running statistics."""
    mean = x_TD.mean(0) if training else norm.running_mean
    variance = ((x_TD - mean) ** 2).mean(0) if training else norm.running_var
    return (x_TD - mean) / torch.sqrt(variance + norm.eps)


def plain_fine_grained(x_TD, moe, normal_TD):
    """Each token scores all pairs of keys of each head; its K best neurons one by one; then the dense branch."""
    act = PLAIN_ACTIVATIONS[moe.activation]
    H, G, K = moe.gate.num_heads, moe.gate.num_keys, moe.gate.top_k
    logits = (normal_TD @ moe.gate.weight.t()).reshape(-1, H, 2, G)
    rows = []
    for x_D, halves in zip(x_TD, torch.log_softmax(logits, -1), strict=True):
        y_D = torch.zeros_like(x_D)
        for half in halves:
            scores = (half[0][:, None] + half[1][None, :]).flatten()
            picked = best(scores, K)
            weights = scores[picked].exp()
            weights = weights / weights.sum() if moe.gate.norm_topk_prob else weights
            for w, e in zip(weights, picked, strict=True):
                y_D = y_D + w * act(x_D @ moe.down_embed[e]) * moe.up_embed[e]
        if moe.gate_proj is not None:
            y_D = y_D + (act(x_D @ moe.gate_proj.weight.t()) * (x_D @ moe.up_proj.weight.t())) @ moe.down_proj.weight.t()
        rows.append(y_D)
    return torch.stack(rows), logits


def trained_leaves(layer):
    return tuple(p for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("impl", ["auto", "dense"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_flashmoe_equals_the_formula(impl, norm_topk_prob, training):
    layer = make(impl=impl, norm_topk_prob=norm_topk_prob).train(training)
    norm = layer.moe.gate.norm
    norm.running_mean.copy_(randn(D, seed=5))
    norm.running_var.copy_(randn(D, seed=6).square() + 0.5)
    x = randn(B, S, D, seed=1).requires_grad_()
    x_TD = x.reshape(-1, D)
    exact, exact_logits = plain_fine_grained(x_TD, layer.moe, normalised(x_TD, norm, training))
    y, logits = layer(x)
    assert_close(y.reshape(-1, D), exact, **EXACT)
    assert logits.shape == (2, B * S, G)
    assert_close(logits, exact_logits[:, 0].transpose(0, 1), **EXACT)
    leaves = (x, *trained_leaves(layer))
    assert len(leaves) == 7  # x, the keys, two tables, three matrices of the dense branch
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact.reshape(x.shape), leaves), strict=True):
        assert exact_grad.abs().max() > 1e-6
        assert_close(grad, exact_grad, **EXACT)


@pytest.mark.parametrize("hidden_act", [*sorted(PLAIN_ACTIVATIONS.keys() - {"gelu_tanh", "identity"}), *THEIR_NAMES])
def test_every_activation_by_the_names_of_transformers(hidden_act):
    layer = make(hidden_act=hidden_act)
    assert layer.moe.activation == THEIR_NAMES.get(hidden_act, hidden_act)
    x = randn(B, S, D, seed=1)
    x_TD = x.reshape(-1, D)
    exact, _ = plain_fine_grained(x_TD, layer.moe, normalised(x_TD, layer.moe.gate.norm, training=True))
    assert_close(layer(x)[0].reshape(-1, D), exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_routes_and_computes_close_to_float64(dtype):
    layer, x = make(dtype).eval(), randn(B, S, D, seed=1, dtype=dtype)
    exact_layer = make(dtype).double().eval()
    y, logits = layer(x)
    exact, exact_logits = exact_layer(x.double())
    assert y.dtype == dtype and logits.dtype == torch.float32
    assert_close(logits.double(), exact_logits, rtol=1e-4, atol=1e-4)
    assert_close(y.double(), exact, rtol=0, atol=(8 * torch.finfo(dtype).eps * exact.abs().max()).item())


def test_a_checkpoint_of_flashmoe_loads():
    linear = {"gate_proj": (FF, D), "up_proj": (FF, D), "down_proj": (D, FF), "router_gate": (2 * G, D)}
    tables = {"down_embed": (E, D), "up_embed": (E, D)}
    original = {f"{name}.weight": randn(*shape, seed=i) for i, (name, shape) in enumerate({**linear, **tables}.items())}
    original |= {"router_norm.running_mean": randn(D, seed=7), "router_norm.running_var": randn(D, seed=8).square() + 0.5}
    original |= {"router_norm.num_batches_tracked": torch.tensor(3)}
    layer = make().eval()
    model = torch.nn.Sequential(layer)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in original.items()})
    x_TD = randn(S, D, seed=1)
    normal = (x_TD - original["router_norm.running_mean"]) / torch.sqrt(original["router_norm.running_var"] + 1e-5)
    y, logits = model(x_TD)
    assert_close(logits.transpose(0, 1), (normal @ original["router_gate.weight"].t()).reshape(-1, 2, G), **EXACT)
    assert torch.equal(layer.moe.up_embed, original["up_embed.weight"])
    again = make().eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x_TD)[0], y)


@pytest.mark.parametrize(("num_heads", "input_norm", "intermediate_size"), [(1, None, None), (3, None, FF), (2, "rms", None)])
def test_fine_grained_block_equals_the_formula(num_heads, input_norm, intermediate_size):
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_heads": num_heads, "input_norm": input_norm, "intermediate_size": intermediate_size}
    moe = FineGrainedMoE(D, E, K, dtype=torch.float64, activation="gelu", **options)
    x = randn(B, S, D, seed=1).requires_grad_()
    x_TD = x.reshape(-1, D)
    normal = x_TD if moe.gate.norm is None else moe.gate.norm(x_TD)
    exact, exact_logits = plain_fine_grained(x_TD, moe, normal)
    y, logits = moe(x)
    assert_close(y.reshape(-1, D), exact, **EXACT)
    assert logits.shape == (B, S, num_heads, 2, G)
    assert_close(logits.reshape(exact_logits.shape), exact_logits, **EXACT)
    leaves = (x, *moe.parameters())
    for grad, exact_grad in zip(gradients(y, leaves), gradients(exact.reshape(x.shape), leaves), strict=True):
        assert_close(grad, exact_grad, **EXACT)


@pytest.mark.parametrize("shape", [(0, 3, D), (1, 1, D), (5, D)], ids=str)
def test_any_leading_dimensions(shape):
    layer = make().eval()
    y, logits = layer(torch.zeros(shape, dtype=torch.float64))
    assert y.shape == shape and logits.shape == (2, y[..., 0].numel(), G)


def test_compiled_with_an_open_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    layer = make().eval()
    fast = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (7, 14, 23):
        x = randn(2, T, D, seed=T)
        mark_dynamic(x, 1)
        (y, logits), (expected, expected_logits) = fast(x), layer(x)
        assert_close(y, expected, **EXACT)
        assert_close(logits, expected_logits, **EXACT)
        leaves = trained_leaves(layer)
        for grad, exact in zip(gradients(y, leaves, False), gradients(expected, leaves), strict=True):
            assert_close(grad, exact, **EXACT)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "^hidden_size must be at least 1, got 0$"),
        ({"intermediate_size": None}, TypeError, "^intermediate_size must be an integer, got None$"),
        ({"hidden_act": "tanh"}, ValueError, "^hidden_act must be one of .*, got 'tanh'$"),
        ({"num_experts": 2.0}, TypeError, "^num_experts must be an integer, got 2.0$"),
        ({"num_experts_per_tok": 26}, ValueError, r"^num_experts_per_tok must be from 1 to num_experts \(25\), got 26$"),
        ({"norm_topk_prob": 1}, TypeError, "^norm_topk_prob must be True or False, got 1$"),
    ],
)
def test_config_says_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        FlashMoEConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts": 24}, ValueError, "^num_experts must be the square of a number of keys, such as 16 or 25, got 24$"),
        ({"num_experts": 0}, ValueError, "^num_experts must be the square of a number of keys"),
        ({"num_experts": "25"}, TypeError, "^num_experts must be an integer, got '25'$"),
        ({"top_k": 26}, ValueError, "^top_k must be at most 25"),
        ({"activation": "tanh"}, ValueError, "^activation must be one of"),
        ({"intermediate_size": 0}, ValueError, "^intermediate_size must be at least 1, or None for no dense branch, got 0$"),
        ({"input_norm": "layer"}, ValueError, "^input_norm must be None, 'batch' or 'rms', got 'layer'$"),
    ],
)
def test_fine_grained_block_says_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        FineGrainedMoE(**{"hidden_size": D, "num_experts": E, "top_k": K, **changes})


def test_layers_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"^config must be a FlashMoEConfig, got dict$"):
        FlashMoE(SIZES)
    for layer in (make(), FineGrainedMoE(D, E, K)):
        with pytest.raises(ValueError, match=r"^x must have shape \[..., 12\], got \(2, 7\)$"):
            layer(torch.zeros(2, 7))
