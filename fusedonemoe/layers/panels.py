"""Parameters of :class:`~fusedonemoe.Experts` that are panels: what may become them, and the way between both forms.

Whether a parameter is panels is read off the tensor that is there: panels have five dimensions, weights three.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fusedonemoe.functional.packed import PackedExperts, check_can_pack, refuse_packed_training
from fusedonemoe.ops import library
from fusedonemoe.ops.library import PanelHome
from fusedonemoe.ops.records import PLAIN

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from fusedonemoe.layers.moe import Experts


def is_panels(tensor: Tensor | None) -> bool:
    """Return whether a weight is in the form of panels."""
    return tensor is not None and tensor.dim() == library.PANEL_DIMS


def homes_of(experts: "Experts") -> dict[str, PanelHome]:
    """The home form of both weights, by their names; with the order of rows that they were packed with."""
    config = experts.config
    layout = experts._packed_layout or config.act.layout
    return {
        experts._up_name: PanelHome(config.up_rows, config.hidden_size, layout),
        "down_proj": PanelHome(config.hidden_size, config.intermediate_size, PLAIN),
    }


def _held(experts: "Experts", name: str) -> Tensor | None:
    """The tensor under a name: a parameter, what pruning put there, or the original of a parametrization."""
    held: Tensor | None = experts._parameters.get(name, experts.__dict__.get(name))
    computed = experts._modules.get("parametrizations")
    if held is None and isinstance(computed, nn.ModuleDict) and name in computed:
        held = getattr(computed[name], "original", None)
    return held


def packed_names(experts: "Experts") -> list[str]:
    """The weights that are panels."""
    return [name for name in (experts._up_name, "down_proj") if is_panels(_held(experts, name))]


@torch.no_grad()
def home_of(experts: "Experts", name: str) -> Tensor:
    """A weight in home form: the parameter itself, or what its panels hold, in a new tensor."""
    weight: Tensor = getattr(experts, name)
    return library.unpack_weights(weight.detach(), *homes_of(experts)[name]) if is_panels(weight) else weight


@torch.no_grad()
def write_home(experts: "Experts", name: str, weight: Tensor) -> None:
    """Write a contiguous weight in home form into the panels of a parameter."""
    parameter, home = experts.get_parameter(name), homes_of(experts)[name]
    library.check_panels(name, parameter, home)
    library.pack_weight(weight, home.layout, out=parameter.detach())
    torch.autograd.graph.increment_version(parameter)


def refuse_exchange(experts: "Experts") -> None:
    """Refuse packed weights that an exchange between processes would have to read."""
    if experts.exchange is not None:
        raise RuntimeError(f"the weights are packed, which {experts.exchange} cannot use: call unpack() first")


def weights_for_call(
    experts: "Experts", x: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor] | PackedExperts:
    """The weights of one call, at least one of which is panels, as :func:`fusedonemoe.functional.experts_mlp` takes them."""
    config = experts.config
    refuse_exchange(experts)
    _refuse_managed(experts, "call unpack() before fully_shard or FullyShardedDataParallel")
    up_home, down_home = homes_of(experts).values()
    if is_panels(up) and up_home.layout != config.act.layout:
        raise RuntimeError(
            f"the weights were packed with gate_up_layout {experts._packed_layout!r}, and config has {config.act.layout!r}: "
            "call unpack() before changing it"
        )
    if is_panels(up) and is_panels(down):
        return PackedExperts(up, down, up_home.layout, config.hidden_size, config.intermediate_size)
    refuse_packed_training(x, weights, up, down)
    if is_panels(up):
        return library.unpack_weights(up, *up_home), down
    return up, library.unpack_weights(down, *down_home)


def _refuse_managed(experts: "Experts", remedy: str) -> None:
    if getattr(experts, "_is_fsdp_managed_module", False):
        raise RuntimeError(f"FSDP manages these experts, and gathers and shards their parameters by itself: {remedy}")


def _plain_parameter(experts: "Experts", name: str) -> nn.Parameter:
    parameter = experts._parameters.get(name)
    if parameter is None:
        raise RuntimeError(f"{name} must be a parameter of the module itself: something computes it (a parametrization?)")
    if type(parameter) is not nn.Parameter:
        kind = type(parameter).__name__
        raise RuntimeError(f"{name} must be a plain parameter, got a {kind}, which is sharded or stored in another way")
    return parameter


def _refuse_shared_memory(name: str, parameter: nn.Parameter) -> None:
    """A tensor that shares the memory would be left behind with the old weights, and writes into it would be lost."""
    remedy = f"give the parameter memory of its own first: {name}.data = {name}.data.clone()"
    if parameter.is_inference():
        raise ValueError(f"{name} was made in inference mode, where nothing can write into it later: {remedy}")
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.nbytes:
        raise ValueError(f"{name} is a part of a larger piece of memory: {remedy}")
    shared = storage.is_shared()
    del storage  # it is a holder, too
    if shared:
        raise ValueError(f"{name} is in memory that is shared with other processes or a file: {remedy}")
    if _holders(parameter) > _holders(torch.empty(1, device="cpu")):
        raise ValueError(f"{name} shares its memory with another tensor, whose writes would be lost: {remedy}")


def _holders(tensor: Tensor) -> int:
    """Count the tensors, storages and arrays that hold the memory of a tensor, itself and this function included."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


def _put(parameter: nn.Parameter, value: Tensor) -> None:
    """Change what a parameter is, not which: optimizers and collectives that hold it write into the new value."""
    parameter.data = value
    # A graph that saved the old form raises in its backward, as after any change in place.
    torch.autograd.graph.increment_version(parameter)


def pack_in_place(experts: "Experts") -> None:
    """Make panels of both weights; raises before anything is changed."""
    config = experts.config
    if config.impl not in ("auto", "cpu"):
        raise RuntimeError(f"packed weights are for impl='auto' or 'cpu', got impl={config.impl!r}")
    if config.transposed:
        raise ValueError("transposed weights cannot be packed: the CPU kernels read contiguous rows")
    if experts.exchange is not None:
        raise RuntimeError(f"parallel experts cannot be packed: they have an exchange, {experts.exchange}")
    _refuse_managed(experts, "they cannot be packed")
    names = [name for name in homes_of(experts) if name not in packed_names(experts)]
    if not names:
        return
    parameters = {name: _plain_parameter(experts, name) for name in names}
    if experts._up_name in names:
        experts._packed_layout = None
    homes = homes_of(experts)
    up, down = (getattr(experts, name) for name in homes)
    if down.dtype != up.dtype:
        raise TypeError(f"down_proj must have the dtype of {experts._up_name} ({up.dtype}), got {down.dtype}")
    check_can_pack({**parameters})
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            raise RuntimeError(f"{name} has a gradient that waits for a step: call optimizer.step() and zero_grad() first")
        shape = (config.num_experts, homes[name].rows, homes[name].width)
        if tuple(parameter.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to be packed, got {tuple(parameter.shape)}")
        _refuse_shared_memory(name, parameter)
    with torch.inference_mode(False), torch.no_grad():
        panels = {name: library.pack_weight(parameter.detach(), homes[name].layout) for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            _watch_steps()
            _forms[parameter] = (parameter.shape, panels[name].shape)
            _put(parameter, panels[name])
    experts._packed_layout = homes[experts._up_name].layout
    _guard(experts)


def unpack_in_place(experts: "Experts") -> None:
    """Restore the home form of both weights, and of gradients that were given to panels; raises before anything is changed."""
    names = packed_names(experts)
    if not names:
        return
    _refuse_managed(experts, "they cannot be unpacked any more, unpack() comes before fully_shard")
    parameters = {name: _plain_parameter(experts, name) for name in names}
    with torch.inference_mode(False), torch.no_grad():
        weights = {name: home_of(experts, name) for name in names}
        gradients = {
            name: library.unpack_weights(parameter.grad, *homes_of(experts)[name])
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }
        for name, parameter in parameters.items():
            parameter.grad = None
            _put(parameter, weights[name])
            parameter.grad = gradients.get(name)
    experts._packed_layout = None
    for handle in experts._guards:
        handle.remove()
    experts._guards = ()


@contextmanager
def unpacked(experts: "Experts") -> Iterator[None]:
    """The home form inside, and afterwards the form of before."""
    packed = packed_names(experts)
    unpack_in_place(experts)
    try:
        yield
    finally:
        if packed:
            pack_in_place(experts)


# Modules of others that hold the same parameters


def _guard(experts: "Experts") -> None:
    """Let the module that shares the parameters raise by name, where it would fail for a shape or write panels to a file."""
    shared: nn.Module | None = None if experts._shared_with is None else experts._shared_with()
    if shared is None or experts._guards:
        return
    ours = {id(parameter) for parameter in experts.parameters() if is_panels(parameter)}
    handles: list[RemovableHandle] = []
    for module in shared.modules():
        if not isinstance(module, type(experts)) and any(id(parameter) in ours for parameter in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(_refuse_shared_use))
            handles.append(module.register_state_dict_pre_hook(_refuse_shared_use))
    experts._guards = tuple(handles)


def _refuse_shared_use(module: nn.Module, *_: Any) -> None:
    if any(is_panels(parameter) for parameter in module._parameters.values()):
        raise RuntimeError(
            f"the weights of this {type(module).__name__} are packed, by prepack() of a MoE that shares them (MoE.from_hf): call "
            "its unpack() first"
        )


# State dicts, which hold the home form


def save_home(experts: "Experts", destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Replace the panels in a state dict by the weights, in new tensors."""
    for name, parameter in experts._parameters.items():
        if not is_panels(parameter):
            continue
        _refuse_managed(experts, "its packed weights have no state dict, call unpack() before fully_shard")
        if name not in homes_of(experts) or type(parameter) is not nn.Parameter:
            raise RuntimeError(f"{name} is packed and in another form that no state dict has: call unpack() first")
        home = home_of(experts, name)
        destination[prefix + name] = home.requires_grad_(parameter.requires_grad) if keep_vars else home


def as_panels(
    experts: "Experts", state_dict: dict[str, Any], prefix: str, errors: list[str], assign: bool
) -> dict[str, Any] | None:
    """A state dict in which the weights have the form of the module's; None, and what is wrong in ``errors``.

    With ``assign`` the values will become the parameters, with their own dtype; otherwise they are copied into them.
    """
    loaded, homes = dict(state_dict), homes_of(experts)
    count = len(errors)
    for name, home in homes.items():
        value, parameter = state_dict.get(prefix + name), getattr(experts, name)
        if value is None:
            continue
        shape = (experts.config.num_experts, home.rows, home.width)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            errors.append(f"size mismatch for {prefix}{name}: expected {shape}, the shape of the unpacked weight, got {got}.")
        elif is_panels(parameter):
            dtype = value.dtype if assign else parameter.dtype
            try:
                # A copy of plain memory, whatever the value is: on another device, a view, or sharded, which raises.
                with torch.inference_mode(False), torch.no_grad():
                    weight = torch.empty(shape, dtype=dtype, device="cpu")
                    weight.copy_(value)
                    check_can_pack({name: weight})
                    loaded[prefix + name] = library.pack_weight(weight, home.layout)
            except Exception as error:  # as load_state_dict itself does with what a copy raises
                errors.append(f"While packing {prefix}{name}, an exception occurred: {error}.")
    return loaded if len(errors) == count else None


# Optimizer state has the form that the parameter had when the state was made. Fused optimizers read both as flat memory and do
# not compare their shapes, so state of the other form would mix up the elements, or reach past the end: such a step is refused.

# The two shapes of each parameter that was packed once, as long as it lives.
_forms: Any = WeakIdKeyDictionary()


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_other_form)


def _refuse_other_form(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # a traced step compares shapes
        return
    for parameter, shapes in _forms.items():
        state = optimizer.state.get(parameter) if parameter.grad is not None else None
        for name, value in (state or {}).items():
            if isinstance(value, Tensor) and value.shape in shapes and value.shape != parameter.shape:
                form = "packed" if parameter.shape == shapes[1] else "unpacked"
                raise RuntimeError(
                    f"{type(optimizer).__name__} has {name} of shape {tuple(value.shape)} for a parameter that is {form} now, of "
                    f"shape {tuple(parameter.shape)}: unpack() before training, with an optimizer that has trained it unpacked"
                )
