"""What the MLP experts refuse, and that the message names the argument, what was expected and what came."""

from typing import Any

import pytest
import torch

from fusedonemoe import functional as F

T, D, FF, E, K = 5, 6, 4, 3, 2


def arguments(**changes):
    given: dict[str, Any] = {
        "x": torch.zeros(T, D),
        "experts": torch.zeros(T, K, dtype=torch.int64),
        "weights": torch.zeros(T, K),
        "gate_up_proj": torch.zeros(E, 2 * FF, D),
        "down_proj": torch.zeros(E, D, FF),
    }
    return {**given, **changes}


def long(*shape):
    return torch.zeros(shape, dtype=torch.int64)


FLOATS = "float64, float32, bfloat16 or float16"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "^x must be a torch[.]Tensor, got list$"),
        ({"experts": [[0, 1]]}, TypeError, "^experts must be a torch[.]Tensor, got list$"),
        ({"weights": None}, TypeError, "^weights must be a torch[.]Tensor, got NoneType$"),
        ({"gate_up_proj": None}, TypeError, "^gate_up_proj must be a torch[.]Tensor, got NoneType$"),
        ({"down_proj": 1.0}, TypeError, "^down_proj must be a torch[.]Tensor, got float$"),
        ({"gate_up_bias": 0}, TypeError, "^gate_up_bias must be a torch[.]Tensor, got int$"),
        ({"down_bias": 0}, TypeError, "^down_bias must be a torch[.]Tensor, got int$"),
        ({"x": long(T, D)}, TypeError, f"^x must be {FLOATS}, got torch[.]int64$"),
        ({"weights": long(T, K)}, TypeError, f"^weights must be {FLOATS}, got torch[.]int64$"),
        ({"gate_up_proj": long(E, 2 * FF, D)}, TypeError, f"^gate_up_proj must be {FLOATS}, got torch[.]int64$"),
        ({"x": torch.zeros(T, D).to(torch.complex64)}, TypeError, f"^x must be {FLOATS}, got torch[.]complex64$"),
        ({"experts": torch.zeros(T, K)}, TypeError, "^experts must have an integer dtype, got torch[.]float32$"),
        ({"experts": long(T, K).bool()}, TypeError, "^experts must have an integer dtype, got torch[.]bool$"),
        (
            {"down_proj": torch.zeros(E, D, FF).half()},
            TypeError,
            r"^down_proj must have the dtype of x \(torch.float32\), got torch.float16$",
        ),
        ({"gate_up_proj": torch.zeros(E, 2 * FF, D).double()}, TypeError, r"^gate_up_proj must have the dtype of x .*float64$"),
        ({"gate_up_bias": torch.zeros(E, 2 * FF).half()}, TypeError, r"^gate_up_bias must have the dtype of x .*float16$"),
        ({"down_bias": torch.zeros(E, D).bfloat16()}, TypeError, r"^down_bias must have the dtype of x .*bfloat16$"),
        ({"x": torch.zeros(())}, ValueError, r"^x must have shape \[..., D\] with D >= 1, got \(\)$"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"^x must have shape \[..., D\] with D >= 1, got \(3, 0\)$"),
        ({"experts": long()}, ValueError, r"^experts must have shape \[..., K\] with K >= 1, got \(\)$"),
        ({"experts": long(T, 0)}, ValueError, r"^experts must have shape \[..., K\] with K >= 1, got \(5, 0\)$"),
        ({"experts": long(4, K)}, ValueError, r"^experts must have shape \(5, 2\), got \(4, 2\)$"),
        ({"experts": long(1, T, K)}, ValueError, r"^experts must have shape \(5, 2\), got \(1, 5, 2\)$"),
        ({"weights": torch.zeros(T, K + 1)}, ValueError, r"^weights must have shape \(5, 2\), got \(5, 3\)$"),
        ({"weights": torch.zeros(T)}, ValueError, r"^weights must have shape \(5, 2\), got \(5,\)$"),
        ({"x": torch.zeros(T, D + 1)}, ValueError, r"^x must have shape \[..., 6\] to fit gate_up_proj, got \(5, 7\)$"),
        (
            {"gate_up_proj": torch.zeros(2 * FF, D)},
            ValueError,
            r"^gate_up_proj must have 3 dimensions \[E, G, D\], got shape \(8, 6\)$",
        ),
        (
            {"gate_up_proj": torch.zeros(D, 2 * FF), "transposed": True},
            ValueError,
            r"^gate_up_proj must have 3 dimensions \[E, D, G\], got shape \(6, 8\)$",
        ),
        (
            {"gate_up_proj": torch.zeros(E, 7, D)},
            ValueError,
            "^gate_up_proj must have as many gate rows as up rows, got 7 in all$",
        ),
        ({"gate_up_proj": torch.zeros(0, 2 * FF, D)}, ValueError, "^gate_up_proj must hold at least one expert, got E = 0$"),
        ({"down_proj": torch.zeros(E, FF, D)}, ValueError, r"^down_proj must have shape \(3, 6, 4\), got \(3, 4, 6\)$"),
        ({"down_proj": torch.zeros(E + 1, D, FF)}, ValueError, r"^down_proj must have shape \(3, 6, 4\), got \(4, 6, 4\)$"),
        ({"gated": False}, ValueError, r"^down_proj must have shape \(3, 6, 8\), got \(3, 6, 4\)$"),
        (
            {"gate_up_proj": torch.zeros(E, D, 2 * FF), "transposed": True},
            ValueError,
            r"^down_proj must have shape \(3, 4, 6\), got \(3, 6, 4\)$",
        ),
        ({"gate_up_bias": torch.zeros(E, FF)}, ValueError, r"^gate_up_bias must have shape \(3, 8\), got \(3, 4\)$"),
        ({"down_bias": torch.zeros(D)}, ValueError, r"^down_bias must have shape \(3, 6\), got \(6,\)$"),
        ({"activation": "swish"}, ValueError, r"^activation must be one of \('silu', .*'swiglu_oai'\), got 'swish'$"),
        ({"gate_up_layout": "plain"}, ValueError, r"^gate_up_layout must be one of \('gate_up', .*'interleaved'\), got 'plain'$"),
        (
            {"activation": "swiglu_oai", "gated": False},
            ValueError,
            "^activation 'swiglu_oai' is gated by definition, got gated=False$",
        ),
        ({"save_percent": -1}, ValueError, "^save_percent must be an integer from 0 to 100, got -1$"),
        ({"save_percent": 101}, ValueError, "^save_percent must be an integer from 0 to 100, got 101$"),
        ({"save_percent": 0.5}, ValueError, "^save_percent must be an integer from 0 to 100, got 0[.]5$"),
        ({"save_percent": True}, ValueError, "^save_percent must be an integer from 0 to 100, got True$"),
        (
            {"impl": "triton2"},
            ValueError,
            r"^impl must be one of \('auto', 'dense', 'grouped', 'cpu', 'triton', 'portable'\), got 'triton2'$",
        ),
        ({"experts": long(T, K).to("meta")}, ValueError, r"^experts must be on the device of x \(cpu\), got meta$"),
        ({"weights": torch.zeros(T, K, device="meta")}, ValueError, r"^weights must be on the device of x \(cpu\), got meta$"),
        (
            {"down_proj": torch.zeros(E, D, FF, device="meta")},
            ValueError,
            r"^down_proj must be on the device of x \(cpu\), got meta$",
        ),
        (
            {"down_bias": torch.zeros(E, D, device="meta")},
            ValueError,
            r"^down_bias must be on the device of x \(cpu\), got meta$",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        F.experts_mlp(**arguments(**changes))


def test_what_a_device_cannot_run_is_refused_by_name_and_avoided_by_auto():
    on_meta = {name: tensor.to("meta") for name, tensor in arguments().items()}
    with pytest.raises(ValueError, match=r"^impl='grouped' cannot run here: there is no grouped GEMM for device 'meta'$"):
        F.experts_mlp(**on_meta, impl="grouped")
    assert F.experts_mlp(**on_meta).shape == (T, D)


def test_a_good_call_is_not_refused():
    assert F.experts_mlp(**arguments()).shape == (T, D)
    assert F.experts_mlp(**arguments(weights=torch.zeros(T, K).double(), experts=long(T, K).to(torch.int16))).shape == (T, D)


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), ValueError, r"^gate_proj must have 3 dimensions \[E, F, D\], got shape \(2, 3\)$"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 3), ValueError, r"^up_proj must have shape \(2, 3, 4\), got \(2, 4, 3\)$"),
        ([1.0], torch.zeros(2, 4, 3), TypeError, "^gate_proj must be a torch[.]Tensor, got list$"),
        (torch.zeros(2, 3, 4), None, TypeError, "^up_proj must be a torch[.]Tensor, got NoneType$"),
    ],
)
def test_stack_gate_up_names_bad_arguments(gate, up, error, message):
    with pytest.raises(error, match=message):
        F.stack_gate_up(gate, up)


def test_stack_gate_up_puts_the_gate_first():
    gate, up = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    both = F.stack_gate_up(gate, up)
    assert both.shape == (2, 6, 4) and torch.equal(both[:, :3], gate) and torch.equal(both[:, 3:], up)
