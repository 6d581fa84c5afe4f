"""What a checkpoint is loaded into: everything is checked before the first number is written, and dtypes are converted."""

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from fusedonemoe import Experts, MoE, MoEConfig, QuantizedExperts, add_lora
from fusedonemoe.integrations.checkpoints import ExpertWeights, files, load_experts, to_state_dict
from fusedonemoe.integrations.checkpoints.weights import named_tensors
from tests.integrations.checkpoint_layouts import LAYOUTS, loaded, make, same

D, F_, E = 5, 4, 3
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
FIELDS: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": F_,
    "num_experts": E,
    "top_k": 2,
    "bias": True,
    "router_bias": True,
    "selection_bias": True,
    "output_bias": True,
    "shared_intermediate_size": 6,
    "shared_gate": True,
}


def _moe(**changes: Any) -> MoE:
    moe = MoE(MoEConfig(**FIELDS), **changes)
    with torch.no_grad():
        for tensor in moe.state_dict().values():
            if not tensor.is_meta:
                tensor.normal_()
    return moe


def _state(moe: MoE) -> dict[str, Tensor]:
    """A checkpoint with one of everything."""
    state = to_state_dict(moe, "hf", prefix="mlp", block_names={"output_bias": "bias"})
    return {name: tensor.clone() for name, tensor in state.items()}


KEYS = sorted(_state(_moe()))


def _refuses(state: Any, error: type[Exception], *parts: str, into: MoE | None = None) -> None:
    """The call raises, and the module is as it was."""
    moe = into or _moe()
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with pytest.raises(error) as caught:
        load_experts(state, into=moe)
    assert all(part in str(caught.value) for part in parts), caught.value
    after = moe.state_dict()
    for name, tensor in before.items():
        assert tensor.is_meta or torch.equal(after[name].to_dense(), tensor.to_dense()), name


# The checkpoint's dtypes


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_tensors_of_other_dtypes_are_refused_wherever_they_stand(dtype, tmp_path):
    state = _state(_moe())
    for key in KEYS:
        changed = state | {key: state[key].to(dtype)}
        _refuses(changed, TypeError, f"{key} must be float64, float32, bfloat16 or float16", str(dtype))
        with pytest.raises(TypeError, match=str(dtype)):
            load_experts(changed)
    if not dtype.is_complex:  # of one file's header, too
        save_file(state | {"mlp.gate.weight": state["mlp.gate.weight"].to(dtype)}, tmp_path / "model.safetensors")
        _refuses(tmp_path, TypeError, str(tmp_path), "mlp.gate.weight must be", str(dtype))


@pytest.mark.parametrize("key", KEYS)
def test_tensors_without_plain_numbers_are_refused(key):
    state = _state(_moe())
    _refuses(state | {key: state[key].to("meta")}, TypeError, f"{key} must be memory, got a tensor on the meta device")
    _refuses(state | {key: state[key].to_sparse()}, TypeError, f"{key} must be a dense tensor, got torch.sparse_coo")
    with warnings.catch_warnings(action="ignore"):  # of a prototype
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    _refuses(state | {key: nested}, TypeError, f"{key} must be a dense tensor, got a nested one")
    freed = state[key].clone()
    freed.untyped_storage().resize_(0)
    _refuses(state | {key: freed}, TypeError, f"{key} must be a tensor with memory, got one whose memory was freed")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(state[key].shape)
    _refuses(state | {key: fake}, TypeError, f"{key} must be a plain tensor, got FakeTensor")


@pytest.mark.parametrize("key", [key for key in KEYS if "experts" not in key or key == "mlp.bias"])
def test_shapes_beside_the_experts_are_checked_with_and_without_a_module(key):
    state = _state(_moe())
    changed = state | {key: torch.zeros(2, *state[key].shape)}
    _refuses(changed, ValueError, f"{key} must have shape")
    if "shared_expert." not in key:  # whose width only a module knows
        with pytest.raises(ValueError, match=f"{key} must have shape"):
            load_experts(changed)


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floating_dtypes_are_rounded_to_the_modules(stored, dtype):
    state = {name: tensor.to(stored) for name, tensor in _state(_moe(dtype=torch.float64)).items()}
    moe = load_experts(state, into=_moe(dtype=dtype))
    bias = moe.gate.e_score_correction_bias
    assert bias is not None and torch.equal(bias, state["mlp.gate.e_score_correction_bias"].to(bias.dtype))
    assert torch.equal(moe.gate.weight, state["mlp.gate.weight"].to(dtype))
    assert torch.equal(moe.experts.down_proj[1], state["mlp.experts.1.down_proj.weight"].to(dtype))
    weights = load_experts(state, dtype=dtype)
    narrow = dtype in (torch.bfloat16, torch.float16)
    for name, tensor in weights.block.items():
        kept = torch.float32 if narrow and name == "gate.e_score_correction_bias" else dtype
        assert tensor.dtype == kept and torch.equal(tensor, state[f"mlp.{weights.block_names[name]}"].to(kept)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("own", "other"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (*FLOATS[1::-1],)])
def test_numbers_that_are_stored_in_several_dtypes_are_not_narrowed(layout, own, other):
    """Each tensor in turn is the only one of its dtype; none may be rounded to that of another."""
    state = make(layout, E, D, F_)
    for key in state:
        mixed = {name: tensor.to(other if name == key else own) for name, tensor in state.items()}
        weights, exact = loaded(mixed, layout), loaded({name: tensor.double() for name, tensor in mixed.items()}, layout)
        for name, tensor in named_tensors(weights).items():
            assert torch.equal(tensor.double(), named_tensors(exact)[name]), (key, name)


# The module


TENSORS = sorted(_moe().state_dict())


@pytest.mark.parametrize("name", TENSORS)
def test_a_module_whose_tensors_cannot_take_the_numbers_is_refused(name):
    state = _state(_moe())
    owner, _, leaf = name.rpartition(".")

    def replaced(tensor: Tensor) -> MoE:
        moe = _moe()
        module = moe.get_submodule(owner)
        wrap = isinstance(getattr(module, leaf), nn.Parameter)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if wrap else tensor)
        return moe

    like = _moe().state_dict()[name]
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool):
        _refuses(state, TypeError, f"{name} of into must be float64", str(dtype), into=replaced(like.to(dtype)))
    _refuses(state, ValueError, "into is on the meta device", name, into=replaced(like.to("meta")))
    _refuses(state, TypeError, f"{name} must be a dense tensor", into=replaced(like.to_sparse()))
    _refuses(state, ValueError, "must have shape", into=replaced(torch.zeros(2, *like.shape)))
    expanded = torch.zeros(1).expand(like.shape) if like.numel() > 1 else None
    if expanded is not None:
        _refuses(state, ValueError, f"{name} of into must have memory of its own", into=replaced(expanded))
    freed = replaced(like.clone())
    freed.state_dict()[name].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=rf"{name} must be a tensor with memory, got one whose memory was freed"):
        load_experts(state, into=freed)
    with torch.inference_mode():
        made = like.clone()
    _refuses(state, RuntimeError, f"{name} of into was made in inference mode", into=replaced(made))
    with torch.inference_mode():
        assert load_experts(state, into=replaced(like.clone())) is not None


def test_tensors_that_share_memory_are_refused():
    state = _state(_moe())
    moe = _moe()
    assert moe.gate.bias is not None
    # Views of one buffer, of which the second begins within the first.
    buffer = torch.zeros(2 * E)
    moe.gate.bias = nn.Parameter(buffer[:E])
    moe.gate.e_score_correction_bias = buffer[E - 1 : 2 * E - 1]
    _refuses(state, ValueError, "gate.bias and gate.e_score_correction_bias of into share memory", into=moe)
    moe.gate.e_score_correction_bias = buffer[E:]  # the next one does not
    assert torch.equal(load_experts(state, into=moe).gate.weight, state["mlp.gate.weight"])
    tied = _moe()
    tied.shared_expert_gate.weight = nn.Parameter(tied.gate.weight[:1])  # type: ignore[union-attr]
    _refuses(state, ValueError, "shared_expert_gate.weight and gate.weight of into share memory", into=tied)


def test_a_state_dict_over_the_modules_own_memory():
    """The same tensors in the same places are loaded into themselves; in another order they would overwrite each other."""
    plain = {"hidden_size": D, "intermediate_size": F_, "num_experts": E, "top_k": 2}
    moe: Any = MoE(**plain)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    load_experts(to_state_dict(moe, "hf_stacked"), into=moe)
    assert same(before, moe.state_dict())
    other = MoE(**plain, gate_up_layout="up_gate")
    other.experts.gate_up_proj = moe.experts.gate_up_proj
    with pytest.raises(ValueError, match=r"shares memory with experts.gate_up_proj of into .* give a clone"):
        load_experts(to_state_dict(moe, "hf_stacked"), into=other)
    assert same(before, moe.state_dict())
    swapped = {f"experts.{e}.{name}.weight": moe.experts.gate_up_proj[e, rows] for e in range(E) for name, rows in (
        ("gate_proj", slice(F_, None)), ("up_proj", slice(F_)),
    )}  # fmt: skip
    swapped |= {f"experts.{e}.down_proj.weight": moe.experts.down_proj[e] for e in range(E)} | {"gate.weight": moe.gate.weight}
    with pytest.raises(ValueError, match=r"experts.0.gate_proj.weight shares memory with experts.gate_up_proj"):
        load_experts(swapped, into=moe)
    assert same(before, moe.state_dict())
    copies = {name: tensor.detach().clone() for name, tensor in swapped.items()}
    load_experts(copies, into=moe)
    assert torch.equal(moe.experts.gate_up_proj[0, :F_], before["experts.gate_up_proj"][0, F_:])


def test_other_kinds_of_modules_are_refused():
    state = make("hf", E, 16, 16, dtype=torch.float32)
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_experts": E, "top_k": 2}
    adapted, quantised, parametrised, extra = (MoE(**fields) for _ in range(4))
    add_lora(adapted, r=2)
    with pytest.raises(TypeError, match=r"experts must be Experts, .* got LoRAExperts"):
        load_experts(state, into=adapted)
    quantised.experts = QuantizedExperts.from_experts(quantised.experts)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"experts must be Experts, .* got QuantizedExperts"):
        load_experts(state, into=quantised)
    nn.utils.parametrize.register_parametrization(parametrised.experts, "down_proj", nn.Identity())
    nn.utils.parametrize.register_parametrization(parametrised.gate, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"got \['gate.parametrizations.weight.original'\] as well"):
        load_experts(state, into=parametrised)
    extra.register_buffer("step", torch.zeros(()))
    with pytest.raises(ValueError, match=r"got \['step'\] as well, which no checkpoint has"):
        load_experts(state, into=extra)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.0

    def right_inverse(self, weight):
        return weight


@pytest.mark.parametrize("compute", [
    lambda owner, name: prune.identity(owner, name),
    lambda owner, name: nn.utils.parametrize.register_parametrization(owner, name, Scaled()),
], ids=["pruned", "parametrised"])  # fmt: skip
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "output_bias"])
@pytest.mark.parametrize("frozen", [True, False])
def test_weights_that_something_computes_are_refused(compute, name, frozen):
    """Numbers written into a result would be gone at the next call, with the rest of the module loaded."""
    moe = _moe().requires_grad_(not frozen)
    owner, leaf = moe.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if isinstance(getattr(owner, leaf), nn.Parameter):
        compute(owner, leaf)
        with torch.set_grad_enabled(not frozen):
            _refuses(_state(_moe()), ValueError, name.rpartition(".")[0], into=moe)


@pytest.mark.parametrize("hook", [
    lambda moe, state, prefix, metadata: {name: tensor.clone() for name, tensor in state.items()},
    lambda moe, state, prefix, metadata: state.update({name: tensor.detach().cpu() + 0 for name, tensor in state.items()}),
], ids=["another", "in place"])  # fmt: skip
def test_a_state_dict_of_copies_does_not_catch_the_numbers(hook):
    moe, state = _moe(), _state(_moe())
    moe._register_state_dict_hook(hook)
    load_experts(state, into=moe)
    assert same(state, _state(moe))


def test_adapters_are_merged_into_parameters_alone():
    moe: Any = MoE(hidden_size=16, intermediate_size=16, num_experts=E, top_k=2).requires_grad_(False)
    nn.utils.parametrize.register_parametrization(moe.experts, "down_proj", Scaled())
    adapters: Any = add_lora(moe, r=2)["experts"]
    before = adapters.base.gate_up_proj.clone()
    for merge in (adapters.merge, adapters.unload):
        with pytest.raises(RuntimeError, match="down_proj of the base must be a parameter to merge into"):
            merge()
    assert not adapters.merged and torch.equal(adapters.base.gate_up_proj, before)


def test_quantised_and_sharded_parameters_are_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        experts = Experts(MoEConfig(hidden_size=D, intermediate_size=F_, num_experts=E, top_k=2))
        placed = distribute_tensor(experts.down_proj.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        experts.down_proj = nn.Parameter(placed)
        for call in (lambda: load_experts(make("hf", E, D, F_), into=experts), lambda: to_state_dict(experts, "hf")):
            with pytest.raises(TypeError, match=r"experts.down_proj must be a plain tensor, got DTensor"):
                call()
    finally:
        dist.destroy_process_group()
    torchao = pytest.importorskip("torchao.quantization")
    moe = MoE(hidden_size=16, intermediate_size=16, num_experts=E, top_k=2)
    linear = nn.Linear(16, E, bias=False)
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig(version=2))
    moe.gate.weight = linear.weight  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"gate.weight must be a plain tensor, got Int8Tensor"):
        load_experts(make("hf", E, 16, 16), into=moe)


def test_a_disk_that_fails_in_the_middle_is_told_apart_from_a_refusal(tmp_path, monkeypatch):
    """No check foresees it: the error says that the module is partly filled."""
    save_file(_state(_moe()), tmp_path / "model.safetensors")
    read, reads = files.Stored.read, []

    def failing(self: Any, index: slice | None = None) -> Tensor:
        reads.append(self)
        if len(reads) > 4:
            raise OSError("the disk is gone")
        return read(self, index)

    monkeypatch.setattr(files.Stored, "read", failing)
    with pytest.raises(RuntimeError, match=r"MoE now holds a part of the checkpoint .* load again .*OSError: the disk is gone"):
        load_experts(tmp_path, into=_moe())
    moe = _moe()  # where not even the first number was read, nothing has changed
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        load_experts(tmp_path, into=moe)
    assert same(before, moe.state_dict())


# Weights that somebody put together


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate_up_proj": torch.zeros(3, 8, 1)}, ValueError, r"gate_up_proj must have shape \(3, 8, 5\)"),
        ({"gate_up_proj": torch.zeros(1, 8, 5)}, ValueError, r"gate_up_proj must have shape \(3, 8, 5\)"),
        ({"gated": False}, ValueError, r"gate_up_proj must have shape \(3, 4, 5\)"),
        ({"down_proj": torch.zeros(3, 5)}, ValueError, r"down_proj must have 3 dimensions \[E, D, F\]"),
        ({"down_proj": torch.zeros(3, 5, 4).to_sparse()}, TypeError, "down_proj must be a dense tensor"),
        ({"down_bias": torch.zeros(3, 5)}, ValueError, "gate_up_bias and down_bias must both be given, or neither"),
        ({"down_bias": torch.zeros(1), "gate_up_bias": torch.zeros(3, 8)}, ValueError, r"down_bias must have shape \(3, 5\)"),
        ({"gate_up_layout": "gate"}, ValueError, "gate_up_layout must be one of"),
        ({"block": {"router": torch.zeros(3, 5)}}, ValueError, r"block must have names of .* got \['router'\]"),
    ],
)
def test_weights_that_do_not_fit_each_other_are_not_written(changes, error, message):
    fields = {"gate_up_proj": torch.zeros(3, 8, 5), "down_proj": torch.zeros(3, 5, 4)}
    to_state_dict(ExpertWeights(**fields), "hf")
    with pytest.raises(error, match=message):
        to_state_dict(ExpertWeights(**(fields | changes)), "hf")
