"""Modules whose weights cannot be packed: each is refused by name, and nothing is changed."""

import pytest
import torch
from torch import nn

from tests.layers.test_prepack import WEIGHTS, needs_kernels, small_block

pytestmark = needs_kernels


def give_gradient(experts):
    experts.down_proj.grad = torch.zeros_like(experts.down_proj)


def give_part(experts):
    experts.down_proj = nn.Parameter(torch.randn(8, 24, 20)[:4])


def give_alias(experts):
    experts.alias = experts.down_proj.detach()


def give_array(experts):
    experts.alias = experts.down_proj.detach().numpy()


def give_shared(experts):
    experts.down_proj.data = experts.down_proj.data.clone().share_memory_()


def give_inference(experts):
    with torch.inference_mode():
        experts.down_proj = nn.Parameter(torch.randn(4, 24, 20), requires_grad=False)


def give_subclass(experts):
    class Other(nn.Parameter):
        pass

    experts._parameters["down_proj"] = Other(experts.down_proj.detach().clone())


def give_strides(experts):
    experts.down_proj = nn.Parameter(torch.randn(4, 20, 24).transpose(1, 2))


def give_dtype(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.detach().bfloat16())


def give_shape(experts):
    experts.down_proj = nn.Parameter(torch.randn(4, 24, 22))


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (give_gradient, RuntimeError, r"down_proj has a gradient that waits .*zero_grad\(\) first"),
        (give_part, ValueError, r"down_proj is a part of a larger piece of memory: .*\.clone\(\)"),
        (give_alias, ValueError, r"down_proj shares its memory with another tensor"),
        (give_array, ValueError, r"down_proj shares its memory with another tensor"),
        (give_shared, ValueError, r"down_proj is in memory that is shared"),
        (give_inference, ValueError, r"down_proj was made in inference mode"),
        (give_subclass, RuntimeError, r"down_proj must be a plain parameter, got a Other"),
        (give_strides, ValueError, r"down_proj cannot be packed: the CPU kernels read contiguous"),
        (give_dtype, TypeError, r"down_proj must have the dtype of gate_up_proj \(torch.float32\), got torch.bfloat16"),
        (give_shape, ValueError, r"down_proj must have shape \(4, 24, 20\) to be packed"),
        (lambda experts: setattr(experts, "exchange", "E"), RuntimeError, "parallel experts cannot be packed"),
        (lambda experts: setattr(experts, "_is_fsdp_managed_module", True), RuntimeError, "FSDP manages these experts"),
        (lambda experts: experts.to("meta"), ValueError, "do not run on device 'meta'"),
        (lambda experts: experts.double(), ValueError, "the CPU kernels have"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_packed_is_refused_and_nothing_is_changed(give, error, message):
    experts = small_block(impl="auto").experts
    give(experts)
    before = [(experts.get_parameter(name), experts.get_parameter(name).data_ptr()) for name in WEIGHTS]
    with pytest.raises(error, match=message):
        experts.prepack()
    assert experts.packed_bytes == 0
    for name, (parameter, address) in zip(WEIGHTS, before, strict=True):
        assert experts.get_parameter(name) is parameter and parameter.data_ptr() == address
