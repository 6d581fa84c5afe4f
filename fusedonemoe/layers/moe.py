"""The modules: parameters, their initialisation, and a forward that is one call into :mod:`fusedonemoe.functional`."""

import copy
import sys
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as _hooks

from fusedonemoe import functional as F
from fusedonemoe.checks import check_last_dim, check_tensor
from fusedonemoe.config import MoEConfig
from fusedonemoe.functional.calls import traced_build
from fusedonemoe.functional.experts import run_layer, run_packed
from fusedonemoe.functional.traced import block_form, run_block
from fusedonemoe.hf import config_of, tensors_of
from fusedonemoe.layers import panels
from fusedonemoe.layers.routers import TopKRouter, routing_impl
from fusedonemoe.layers.shared_expert import SharedExpert
from fusedonemoe.linear import are_plain, uniform_by_fan_in
from fusedonemoe.ops.exporting import is_exporting
from fusedonemoe.ops.library import PANEL_DIMS
from fusedonemoe.ops.options import options_of
from fusedonemoe.ops.rules import ROUTE_OPTIONS


def _dtensor() -> Any:
    """Return the class of sharded parameters, if it was imported, and else None: its import takes as long as torch's own."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


_dtensor.__dict__["_dynamo_marked_constant"] = True  # see ops/cpu/native.py


class MoEOutput(NamedTuple):
    """The output of :class:`MoE` with ``return_routing=True``.

    Attributes:
        output: ``[..., D]``.
        logits: ``[..., E]`` router logits, float32.
        weights: ``[..., K]`` routing weights, float32.
        experts: ``[..., K]`` int64 ids.
        tokens_per_expert: ``[E]`` int64, how many rows each expert took.
    """

    output: Tensor
    logits: Tensor
    weights: Tensor
    experts: Tensor
    tokens_per_expert: Tensor


class Experts(nn.Module):
    """The experts of a block: stacked weights, expert axis first, under Hugging Face's names.

    Parameters ``gate_up_proj`` ``[E, 2F, D]`` (``up_proj`` ``[E, F, D]`` when plain), ``down_proj`` ``[E, D, F]`` and, with
    biases, ``gate_up_proj_bias`` ``[E, 2F]`` (``up_proj_bias``) and ``down_proj_bias`` ``[E, D]``. With ``transposed`` the two
    weights are ``[E, D, 2F]`` (``[E, D, F]``) and ``[E, F, D]``, and the kernels that need contiguous rows cannot take them.

    Shape:
        x ``[..., D]``, experts ``[..., K]``, weights ``[..., K]`` to ``[..., D]``: Hugging Face's order of arguments.
    """

    down_proj_bias: Tensor | None
    _packed_layout: str | None = None  # the order of rows in the panels, should config be replaced
    _shared_with: "weakref.ref[nn.Module] | None" = None  # the module that from_hf took the parameters of
    _guards: tuple[Any, ...] = ()  # its hooks, while the parameters are packed

    def __init__(self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.num_experts: int = config.num_experts
        self._up_name = "gate_up_proj" if config.gated else "up_proj"
        E, D, F_, G = config.num_experts, config.hidden_size, config.intermediate_size, config.up_rows

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.register_parameter(self._up_name, parameter(E, D, G) if config.transposed else parameter(E, G, D))
        self.down_proj: nn.Parameter = parameter(E, F_, D) if config.transposed else parameter(E, D, F_)
        self.register_parameter(f"{self._up_name}_bias", parameter(E, G) if config.bias else None)
        self.register_parameter("down_proj_bias", parameter(E, D) if config.bias else None)
        # How rows reach experts that other processes hold; integrations.distributed sets it, None where all are here.
        self.exchange: Callable[[Experts, Tensor, Tensor, Tensor], Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every expert as ``nn.Linear`` does: uniform within ``1 / sqrt(fan_in)``."""
        with panels.unpacked(self):
            for name, parameter in self.named_parameters():
                up = name.startswith(self._up_name)
                uniform_by_fan_in(parameter, self.config.hidden_size if up else self.config.intermediate_size)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Run each row of ``x`` through its experts and sum by weight."""
        if self.exchange is not None:
            return self.exchange(self, x, experts, weights)
        return self.compute(x, experts, weights, *self.local_weights())

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Up- and down-projection and their biases, as tensors that an operator can read: this process's, of a ``DTensor``."""
        named: dict[str, Any] = {}
        parameters = self._parameters
        for name in (self._up_name, "down_proj", f"{self._up_name}_bias", "down_proj_bias"):
            # A parametrization or pruning takes a name out of the parameters.
            named[name] = parameters[name] if name in parameters else getattr(self, name)
        if not are_plain(tuple(named.values())) and (dtensor := _dtensor()):
            for name, weight in named.items():
                if isinstance(weight, dtensor):
                    if self.exchange is None and not all(p.is_replicate() for p in weight.placements):
                        raise RuntimeError(
                            f"{name} is sharded over processes: {weight.placements}; it takes "
                            "fusedonemoe.integrations.distributed.ExpertParallel or TensorParallel to compute with shards"
                        )
                    named[name] = weight.to_local()
        up, down, up_bias, down_bias = named.values()
        return up, down, up_bias, down_bias

    def compute(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        """Forward with weights passed in; ``experts`` indexes them. They may be a subset of the experts, or slices of F."""
        config = self.config
        rest = (up_bias, down_bias, config.act, config.save_percent, config.transposed, config.impl)
        if up_proj is None or down_proj is None:
            check_tensor(self._up_name if up_proj is None else "down_proj", None)
        if up_proj.dim() == PANEL_DIMS or down_proj.dim() == PANEL_DIMS:
            given = panels.weights_for_call(self, x, weights, up_proj, down_proj)
            if isinstance(given, F.PackedExperts):
                return run_packed(x, experts, weights, given, *rest)
            up_proj, down_proj = given
        return run_layer(x, experts, weights, up_proj, down_proj, *rest)

    def prepack(self) -> None:
        """Put the weights into the order in which the CPU kernels read them, for inference.

        The parameters stay the same objects under the same names; their values become five-dimensional panels of the same
        dtype, without a second copy. ``state_dict``, ``load_state_dict`` and pickles hold the home form. Moving or casting the
        module unpacks it. Packing packed weights changes nothing.

        Raises:
            ValueError: there are no CPU kernels for these weights here, or they share their memory.
            RuntimeError: ``impl`` names another implementation, a gradient waits, or the parameters are sharded, parallel,
                parametrized or managed by FSDP. Nothing is changed then.
        """
        panels.pack_in_place(self)

    def unpack(self) -> None:
        """Put the weights back into their home form, with the bits that the panels hold, in the same parameters.

        Raises:
            RuntimeError: FSDP manages the module, or something computes the parameters.
        """
        panels.unpack_in_place(self)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights that are packed; 0 for weights in home form."""
        return sum(getattr(self, name).nbytes for name in panels.packed_names(self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        panels.save_home(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        if panels.packed_names(self):
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            state_dict = panels.as_panels(self, state_dict, prefix, args[-1], assign)
            if state_dict is None:
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __copy__(self) -> "Experts":
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "Experts":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy({**self.__dict__, "_shared_with": None, "_guards": ()}, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # The home form: panels are of this machine.
        state = {**self.__dict__, "_shared_with": None, "_guards": (), "_packed_layout": None}
        state["_parameters"] = dict(self._parameters)
        for name in panels.packed_names(self):
            requires_grad = getattr(self, name).requires_grad
            state["_parameters"][name] = nn.Parameter(panels.home_of(self, name), requires_grad=requires_grad)
        return state

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        sizes = options_of(self.config, ("num_experts", "hidden_size", "intermediate_size", "activation", "gated"))
        return ", ".join(f"{name}={value!r}" for name, value in sizes.items())


_WRITTEN = TopKRouter.forward, Experts.forward, Experts.compute, Experts.local_weights


def _classes_are_as_written() -> bool:
    """Return whether nobody has replaced a method of the parts' classes, or registered a hook for all modules.

    Dynamo asks when it compiles and sees no later change, as with the methods and hooks of other modules.
    """
    methods = TopKRouter.forward, Experts.forward, Experts.compute, Experts.local_weights
    return methods == _WRITTEN and not _hooks._has_any_global_hook()


_classes_are_as_written.__dict__["_dynamo_marked_constant"] = True  # see ops/cpu/native.py


def _is_own(part: nn.Module, name: str) -> bool:
    """Return whether a method is the class's. Dynamo guards a method that is read, and no name that ``__dict__`` lacks."""
    return isinstance(getattr(part, name), MethodType) and name not in part.__dict__


def _runs_as_written(experts: Experts) -> bool:
    """Return whether no mode sees the functions that experts call, and nobody has replaced a method of them."""
    return (
        not _len_torch_function_stack()
        and _is_own(experts, "forward")
        and _is_own(experts, "compute")
        and _is_own(experts, "local_weights")
        and _classes_are_as_written()
    )


class MoE(nn.Module):
    """A mixture-of-experts block: router, experts, and optionally a shared dense branch.

    ``y = experts(x, route(x)) [+ b] [+ shared(x) [* sigmoid(x . w_s)]]``. Parameters are plain and carry Hugging Face's names:
    ``gate.weight`` ``[E, D]``, ``experts.gate_up_proj`` ``[E, 2F, D]``, ``experts.down_proj`` ``[E, D, F]``,
    ``shared_expert.{gate,up,down}_proj.weight``, ``shared_expert_gate.weight``, ``output_bias``.

    Args:
        config: a :class:`MoEConfig`; or give its fields as keywords.
        **fields: fields of :class:`MoEConfig`, when ``config`` is None.

    Shape:
        ``[..., D]`` to ``[..., D]`` in the dtype of x.

    Example:
        >>> import torch
        >>> from fusedonemoe import MoE
        >>> moe = MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
        >>> moe(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
        >>> moe(torch.randn(2, 10, 64), return_routing=True).tokens_per_expert.sum()
        tensor(40)
    """

    def __init__(
        self,
        config: MoEConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is None:
            config = MoEConfig(**fields)
        elif not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}; give sizes by keyword")
        elif fields:
            raise TypeError(f"give either config or its fields, got both: {sorted(fields)}")
        self.config = config
        rule = options_of(config, ("hidden_size", "num_experts", "top_k", "selection_bias", *ROUTE_OPTIONS))
        made: Any = {"device": device, "dtype": dtype}
        self.gate: TopKRouter = TopKRouter(**rule, bias=config.router_bias, impl=routing_impl(config.impl), **made)
        self.experts: Experts = Experts(config, **made)
        D, width = config.hidden_size, config.shared_intermediate_size
        self.shared_expert: SharedExpert | None = None if width is None else SharedExpert(config, width, **made)
        self.shared_expert_gate: nn.Linear | None = nn.Linear(D, 1, bias=False, **made) if config.shared_gate else None
        self.output_bias: nn.Parameter | None = nn.Parameter(torch.zeros(D, **made)) if config.output_bias else None

    @classmethod
    def from_hf(cls, module: nn.Module, config: MoEConfig | None = None) -> "MoE":
        """A block over the parameters of a transformers sparse block, which are shared and not copied.

        The parameters are the same objects: values, gradients and optimizer states are common, and training either trains both.
        A selection bias shares its storage only: moving either module later parts the two, and so does a cast of ``module``.
        While the weights are packed (:meth:`prepack`), ``module`` raises when it is called or saved.

        Args:
            module: the block of router and experts, as transformers 5 has it in memory.
            config: how it routes; None reads the configuration that the module keeps.

        Raises:
            TypeError: ``module`` is no module.
            ValueError: the family is not known; the block does what a MoE does not; or its weights are cut in other tensors.

        Example:
            >>> import torch
            >>> from fusedonemoe import MoE
            >>> block = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)  # any block with these names
            >>> shared = MoE.from_hf(block, config=block.config)
            >>> shared.experts.down_proj is block.experts.down_proj
            True
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if config is None:
            config = MoEConfig.from_hf(config_of(module))
        moe = cls(config, device="meta")
        expected = {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()}
        for name, tensor in tensors_of(module, expected).items():
            owner, _, leaf = name.rpartition(".")
            setattr(moe.get_submodule(owner), leaf, tensor)
        moe.experts._shared_with = weakref.ref(module)  # without keeping it alive
        return moe.train(module.training)

    def reset_parameters(self) -> None:
        """Initialise every part again, as after ``to_empty`` of a block that was built on the meta device."""
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)
        for part in self.modules():
            if isinstance(part, TopKRouter | Experts | nn.Linear):
                part.reset_parameters()

    def prepack(self) -> None:
        """Pack the expert weights for inference on CPU, in place; see :meth:`Experts.prepack`."""
        self.experts.prepack()

    def unpack(self) -> None:
        """Put packed expert weights back into their home form; see :meth:`Experts.unpack`."""
        self.experts.unpack()

    @overload
    def forward(self, x: Tensor, *, return_routing: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, return_routing: Literal[True]) -> MoEOutput: ...

    def forward(self, x: Tensor, *, return_routing: bool = False) -> Tensor | MoEOutput:
        """Run the block.

        Args:
            x: ``[..., D]``.
            return_routing: return a :class:`MoEOutput` instead of the output alone.
        """
        if (not is_dynamo_compiling() or is_exporting()) and x.shape[-1:] != (self.config.hidden_size,):
            # Ranks that wait for this one hear of it, instead of waiting for the timeout.
            ranks = getattr(getattr(self.experts, "exchange", None), "ranks", None)
            if ranks is not None:
                ranks.tell_refusal(self.experts.down_proj.device)
            check_last_dim("x", x, self.config.hidden_size)
        parts = self._modules  # an attribute of a module takes a Python function
        whole = None if return_routing else self._whole(x)
        if whole is not None:
            y: Tensor = whole
        else:
            logits, weights, experts = parts["gate"](x)  # type: ignore[misc]
            y = parts["experts"](x, experts, weights)  # type: ignore[misc]
        if self.output_bias is not None:
            y = y + self.output_bias.to(y.dtype)  # under autocast y is not the parameter's
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(x))
            y = y + shared
        if not return_routing:
            return y
        counts = F.tokens_per_expert(experts, self.config.num_experts)
        return MoEOutput(y, logits, weights, experts, counts)

    def _whole(self, x: Tensor) -> Tensor | None:
        """Run router and experts as one operator; None where somebody could see a difference, or another has to run them."""
        compiling = is_dynamo_compiling()
        if is_exporting() if compiling else torch.is_grad_enabled() or type(x) is not Tensor:
            return None
        gate, experts = self._modules["gate"], self._modules["experts"]
        if type(gate) is not TopKRouter or type(experts) is not Experts:
            return None
        for part in (gate, experts):  # what a call of the module would run
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return None
            if not compiling and part._compiled_call_impl is not None:
                return None
        if not _runs_as_written(experts) or not _is_own(gate, "forward"):
            return None
        if experts.exchange is not None or gate.impl != "auto":
            return None
        router, weights, config, up_name = gate._parameters, experts._parameters, experts.config, experts._up_name
        try:
            gate_weight, up, down = router["weight"], weights[up_name], weights["down_proj"]
            biases = weights[f"{up_name}_bias"], weights["down_proj_bias"]
            router_biases = router["bias"], gate._buffers["e_score_correction_bias"]
        except KeyError:  # a parametrization or pruning has taken a name out
            return None
        if gate_weight is None or up is None or down is None or up.dim() != 3 or down.dim() != 3:
            return None
        given = gate_weight, *router_biases, up, down, *biases
        if not are_plain(given):
            return None
        if compiling:
            forms = gate.__dict__.get("_form"), config.experts_form
            return None if forms[0] is None or forms[1] is None else block_form(x, *given, *forms, traced_build())
        checked = gate.__dict__.get("_checked")
        if checked is None or config.transposed:
            return None
        rule, *made_for = checked
        if (
            made_for != [gate_weight.shape[0], router_biases[1] is not None]
            or torch._C._is_tracing()
            or torch._C._len_torch_dispatch_stack()
        ):
            return None
        try:
            return run_block(x, given, rule, config.act, config.impl)
        except (ValueError, NotImplementedError):  # the parts name the argument, or take it
            return None
