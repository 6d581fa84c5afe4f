"""Low-rank adapters on experts: :class:`LoRAExperts` over frozen weights, and :func:`add_lora` for a whole model."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusedonemoe import functional as F
from fusedonemoe.layers.form import ExpertsForm, form_of
from fusedonemoe.layers.moe import Experts
from fusedonemoe.layers.panels import packed_names
from fusedonemoe.layers.peft_refusal import RefusesPeft, check_no_peft, show_to_peft
from fusedonemoe.linear import uniform_by_fan_in
from fusedonemoe.ops.options import ACTIVATION_OPTIONS, options_of

TARGETS = ("gate_up", "down")


def _per_target(name: str, value: Any, targets: Sequence[str], kind: type | tuple[type, ...]) -> dict[str, Any]:
    """The value of each target, from one for all of them or a mapping."""
    values: dict[str, Any] = {**value} if isinstance(value, Mapping) else dict.fromkeys(targets, value)
    if set(values) != set(targets):
        raise ValueError(f"{name} must have a value for each of {tuple(targets)}, got {value!r}")
    for number in values.values():
        if isinstance(number, bool) or not isinstance(number, kind) or not 0 < number < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'} above 0, got {value!r}")
    return values


def check_adapter_dtype(dtype: object) -> None:
    """Raise unless adapters can have this dtype, or None for the default."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, which can be trained, got {dtype}")


@contextmanager
def unchanged_by_failure(model: nn.Module) -> Iterator[None]:
    """Put back what requires gradients and what was packed, if the body raises."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    packed = [module for module in model.modules() if isinstance(module, Experts) and packed_names(module)]
    try:
        yield
    except BaseException:
        for module in packed:
            module.prepack()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


class LoRAExperts(RefusesPeft):
    """Experts with a low-rank adapter on each targeted projection: ``W_e + scale * B_e A_e``, never formed.

    The base is frozen: its parameters get no gradient, and none is computed. Its parameters keep their names; those of the
    adapters are ``gate_up_lora_A`` ``[E, r, D]``, ``gate_up_lora_B`` ``[E, G, r]``, ``down_lora_A`` ``[E, r, F]`` and
    ``down_lora_B`` ``[E, D, r]``. A starts as ``nn.Linear`` would in PEFT's layout, which has all experts in one matrix
    (uniform within ``1 / sqrt(in)``), and B at zero, so that at first the adapted experts are the base.

    Args:
        base: an :class:`Experts`; or any module that :class:`ExpertsForm` can describe.
        r: rank, one for all targets or ``{"gate_up": 8, "down": 4}``.
        alpha: ``scale = alpha / r``; one or a mapping.
        targets: the projections with an adapter: ``"gate_up"``, ``"down"`` or both.
        use_rslora: ``scale = alpha / sqrt(r)`` (arXiv 2312.03732).
        form: of a ``base`` that is no :class:`Experts`.
        dtype: of the adapters. By default float32 with half-precision weights, as an optimizer's small steps need, and
            otherwise that of the weights; products run in the dtype of x.

    Raises:
        TypeError, ValueError: a ``base`` without a form, or a rank, an alpha or a target that is none.

    Example:
        >>> import torch
        >>> from fusedonemoe import LoRAExperts, MoE
        >>> moe = MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
        >>> moe.experts = LoRAExperts(moe.experts, r=8, alpha=16)
        >>> moe(torch.randn(10, 64)).square().mean().backward()
        >>> moe.experts.base.gate_up_proj.grad is None, moe.experts.gate_up_lora_B.grad.shape
        (True, torch.Size([8, 256, 8]))
    """

    gate_up_lora_A: Tensor | None
    gate_up_lora_B: Tensor | None
    down_lora_A: Tensor | None
    down_lora_B: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int | Mapping[str, int] = 8,
        alpha: float | Mapping[str, float] = 16,
        targets: Sequence[str] = TARGETS,
        use_rslora: bool = False,
        form: ExpertsForm | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        form = form or form_of(base)
        if form is None:
            raise TypeError(f"base must be an Experts, or come with a form=, got {type(base).__name__}")
        if isinstance(targets, str) or not targets or set(targets) - set(TARGETS) or len(set(targets)) != len(targets):
            raise ValueError(f"targets must be some of {TARGETS}, each once, got {targets!r}")
        check_adapter_dtype(dtype)
        self.form = form
        self.targets: tuple[str, ...] = tuple(target for target in TARGETS if target in targets)
        self.r: dict[str, int] = _per_target("r", r, self.targets, int)
        self.alpha: dict[str, float] = _per_target("alpha", alpha, self.targets, (int, float))
        self.use_rslora = use_rslora
        self._originals: dict[str, Tensor] = {}
        with unchanged_by_failure(base):
            if isinstance(base, Experts):
                base.unpack()
            base.requires_grad_(False)
            self._make_factors(base, form, dtype)
        self.base = base
        self.register_state_dict_pre_hook(refuse_merged)
        self.register_load_state_dict_pre_hook(refuse_merged)
        self.reset_parameters()
        show_to_peft(LoRAExperts)

    def _make_factors(self, base: nn.Module, form: ExpertsForm, dtype: torch.dtype | None) -> None:
        for target in TARGETS:
            A = B = None
            if target in self.targets:
                weight, rank = getattr(base, form.name(target)), self.r[target]
                E, rows, columns = weight.shape
                out, inner = (columns, rows) if form.transposed else (rows, columns)
                options: Any = {"device": weight.device, "dtype": dtype or torch.promote_types(weight.dtype, torch.float32)}
                A = nn.Parameter(torch.empty(E, rank, inner, **options))
                B = nn.Parameter(torch.empty(E, out, rank, **options))
            self.register_parameter(f"{target}_lora_A", A)
            self.register_parameter(f"{target}_lora_B", B)

    @property
    def scale(self) -> dict[str, float]:
        """The factor on each target's ``B A``: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``."""
        return {t: self.alpha[t] / (math.sqrt(self.r[t]) if self.use_rslora else self.r[t]) for t in self.targets}

    @property
    def merged(self) -> bool:
        """Return whether the base holds the adapters at the moment."""
        return len(self._originals) > 0  # torch.compile guards on the length of a dict and not on its truth

    @property
    def _adapts(self) -> bool:
        return not self.merged

    def factors(self, target: str) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of a target that has an adapter."""
        if target not in self.targets:
            raise ValueError(f"target must be one of {self.targets}, got {target!r}")
        return getattr(self, f"{target}_lora_A"), getattr(self, f"{target}_lora_B")

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero: an adapter that changes nothing."""
        for target in self.targets:
            A, B = self.factors(target)
            uniform_by_fan_in(A, A.shape[2])
            nn.init.zeros_(B)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Run each row of ``x`` through its adapted experts and sum by weight."""
        self._refuse_packed()
        form, base = self.form, self.base
        options = options_of(form, (*ACTIVATION_OPTIONS, "transposed", "save_percent", "impl"))
        for argument, name in (("gate_up_bias", form.up_bias), ("down_bias", form.down_bias)):
            options[argument] = None if name is None else getattr(base, name)
        arguments = (x, experts, weights, getattr(base, form.up), getattr(base, form.down))
        if not self._adapts:
            return F.experts_mlp(*arguments, **options)
        scale = self.scale
        for target in self.targets:
            A, B = self.factors(target)
            options |= {f"{target}_A": A, f"{target}_B": B, f"{target}_scale": scale[target]}
        return F.experts_mlp_lora(*arguments, **options)

    def _refuse_packed(self) -> None:
        if isinstance(self.base, Experts) and packed_names(self.base):
            raise RuntimeError("the weights of the base are packed, which adapters cannot use: call unpack() first")

    @torch.no_grad()
    def _merge_into(self, target: str, out: Tensor, weight: Tensor) -> None:
        """``out = weight + scale B A``, one expert at a time, added in float32 or wider and rounded once."""
        A, B = self.factors(target)
        scale, wide = self.scale[target], torch.promote_types(weight.dtype, torch.float32)
        for e in range(weight.shape[0]):
            delta = B[e].to(wide) @ A[e].to(wide)
            out[e] = weight[e].to(wide).add(delta.t() if self.form.transposed else delta, alpha=scale)

    def merged_weights(self) -> dict[str, Tensor]:
        """The adapted projections by their names in the base, as new tensors of the base's dtype and layout.

        Raises:
            RuntimeError: the base holds the adapters already, or its weights are packed.
        """
        refuse_merged(self)
        self._refuse_packed()
        merged = {}
        for target in self.targets:
            name = self.form.name(target)
            weight = getattr(self.base, name).detach()
            merged[name] = torch.empty_like(weight)
            self._merge_into(target, merged[name], weight)
        return merged

    def merge(self) -> None:
        """Add the adapters to the base, for inference at the base's cost; :meth:`unmerge` undoes it to the bit.

        The original weights are kept, which :meth:`unload` does not do. While merged, adapters get no gradient, and a state
        dict is refused, as it would hold them twice.

        Raises:
            RuntimeError: they are merged already, or pruning or a parametrization computes a weight of the base.
        """
        self.unpack()
        merged = self.merged_weights()
        parameters = {name: _own_parameter(self.base, name) for name in merged}
        for name, parameter in parameters.items():
            self._originals[name], parameter.data = parameter.data, merged[name]

    def unmerge(self) -> None:
        """Put the original weights back, the very same tensors; a RuntimeError if nothing is merged."""
        if not self.merged:
            raise RuntimeError("unmerge() undoes merge(), and nothing is merged")
        self.unpack()
        for name, original in self._originals.items():
            getattr(self.base, name).data = original
        self._originals = {}

    def unload(self, *, merge: bool = True) -> nn.Module:
        """Return the base without adapters, which ``merge`` adds to its weights first, in place, one expert at a time.

        Raises:
            RuntimeError: pruning or a parametrization computes a weight that they would be added to.
        """
        if self.merged:
            self.unmerge()
        self.unpack()
        if merge:
            weights = {target: _own_parameter(self.base, self.form.name(target)).data for target in self.targets}
            for target, weight in weights.items():
                self._merge_into(target, weight, weight)
        return self.base

    def prepack(self) -> None:
        """Refused with a RuntimeError: packed weights are of plain experts."""
        raise RuntimeError("packed weights are of plain experts: put unload() in this module's place, then prepack()")

    def unpack(self) -> None:
        """Put the weights of the base back into their home form, should it have been packed by itself."""
        if isinstance(self.base, Experts):
            self.base.unpack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAExperts":
        self._originals = {name: fn(original) for name, original in self._originals.items()}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The adapters, for ``print(module)``."""
        adapters = (f"{target}: r={self.r[target]}, scale={self.scale[target]:g}" for target in self.targets)
        return ", ".join((*adapters, "merged" if self.merged else "not merged"))


def _own_parameter(base: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter of the base. What is written into the result of a computation would be lost."""
    weight = getattr(base, name)
    if not any(weight is parameter for parameter in base.parameters()):
        raise RuntimeError(f"{name} of the base must be a parameter to merge into: remove its parametrisation or pruning first")
    return weight


def refuse_merged(module: nn.Module, *_: Any) -> None:
    """No state dict while the base holds the adapters."""
    if isinstance(module, LoRAExperts) and module.merged:
        raise RuntimeError("the base holds the adapters, which would count twice: call unmerge() first")


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that is ``name`` or, as a regular expression, the end of it behind a dot."""
    values = (value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name))
    return next(values, default)


def add_lora(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = TARGETS,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    read: Callable[[nn.Module], ExpertsForm | None] | None = None,
) -> dict[str, LoRAExperts]:
    """Put a :class:`LoRAExperts` in the place of each module of experts in a model, and freeze all else.

    Args:
        model: is changed; its parameters stop requiring gradients, and those of the adapters do.
        r: this, ``alpha``, ``targets``, ``use_rslora`` and ``dtype`` are those of :class:`LoRAExperts`.
        rank_pattern: other ranks by the name of a projection, such as ``{"layers.0.experts.down_proj": 4}``: the end of it, or
            a regular expression for that, as in PEFT. The first that fits counts.
        alpha_pattern: other values of ``alpha``, likewise.
        read: how to read a module, None for one that is left alone; by default each :class:`Experts` is adapted.

    Returns:
        The new modules by name.

    Raises:
        ValueError: the model holds no experts, is itself one, or has adapters already, of this library or of PEFT.

    Example:
        >>> from fusedonemoe import MoE, add_lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> adapters = add_lora(moe, r=4, rank_pattern={"down_proj": 2})
        >>> adapters["experts"].r
        {'gate_up': 4, 'down': 2}
    """
    check_no_adapters(model)
    forms = {name: form for name, module in model.named_modules() if (form := (read or form_of)(module)) is not None}
    if not forms:
        raise ValueError(f"model must hold experts that can be adapted, got {type(model).__name__} without any")
    if "" in forms:
        raise ValueError("model must hold its experts as a module inside; for experts alone call LoRAExperts")
    options: Any = {"targets": targets, "use_rslora": use_rslora, "dtype": dtype}
    added = {}
    with unchanged_by_failure(model):
        for name, form in forms.items():
            ranks = {t: pattern_value(rank_pattern, f"{name}.{form.name(t)}", r) for t in targets}
            alphas = {t: pattern_value(alpha_pattern, f"{name}.{form.name(t)}", alpha) for t in targets}
            added[name] = LoRAExperts(model.get_submodule(name), r=ranks, alpha=alphas, form=form, **options)
    put_in_place(model, added, trainable=True)
    return added


def check_no_adapters(model: nn.Module) -> None:
    """Raise if a model has adapters, of this library or of PEFT."""
    if any(isinstance(module, LoRAExperts) for module in model.modules()):
        raise ValueError("model must have no adapters yet, got one with LoRAExperts in it")
    check_no_peft(model)


def put_in_place(model: nn.Module, added: Mapping[str, LoRAExperts], *, trainable: bool) -> None:
    """Put adapters around the experts of a model, which is frozen but for them."""
    model.requires_grad_(False)
    for name, module in added.items():
        module.train(module.base.training)
        for target in module.targets:
            for factor in module.factors(target):
                factor.requires_grad_(trainable)
        model.set_submodule(name, module)
