"""Experts' adapters that stay PEFT's: its matrices, names and switches, with this library's arithmetic.

What PEFT does to a model it does to the layers of its own class, and to tensors by their names. So the module here is of that
class, and keeps PEFT's modules ``lora_A`` and ``lora_B`` in the places that PEFT gave them: the adapter of the parameter that
was registered last on the outer module, that of the other one on its ``base_layer``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from fusedonemoe.integrations.adapter_layouts import split_factors
from fusedonemoe.layers.form import ExpertsForm
from fusedonemoe.layers.lora import TARGETS, LoRAExperts, refuse_merged
from fusedonemoe.linear import uniform_by_fan_in
from fusedonemoe.ops import notice


class AdapterLevel(LoraLayer):
    """The adapters of one parameter, as PEFT's wrapper of it kept them."""

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B")
    other_param_names: tuple[str, ...] = ("scaling",)
    lora_embedding_A: Any = MappingProxyType({})
    lora_embedding_B: Any = MappingProxyType({})

    def get_param(self) -> Tensor:
        """The adapted parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own asks the base for a weight, which experts do not have under that name.
        parameter = self.get_param()
        for level in (self.lora_A, self.lora_B):
            if adapter_name in level and not level[adapter_name].weight.is_meta:
                level[adapter_name].to(parameter.device if device is None else device)

    def _take(self, wrapper: Any) -> None:
        self.parameter_name: str = wrapper.parameter_name
        self.num_experts: int = wrapper.num_experts
        inner = wrapper.base_layer
        self.base_layer: Any = HeldAdapters(inner) if isinstance(inner, ParamWrapper) else inner
        self.lora_A: nn.ModuleDict = wrapper.lora_A
        self.lora_B: nn.ModuleDict = wrapper.lora_B
        self.scaling: dict[str, float] = dict(wrapper.scaling)
        roots = {name: math.sqrt(r) if wrapper.use_rslora.get(name) else r for name, r in wrapper.r.items()}
        self._configured_scaling = {name: wrapper.lora_alpha[name] / root for name, root in roots.items()}
        self.merged_adapters: list[str] = []
        self.lora_variant: dict[str, Any] = {}
        self.cast_input_dtype_enabled = True
        self._disable_adapters = wrapper.disable_adapters
        self._active_adapter = list(wrapper.active_adapters)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter's scale a multiple of the one that its configuration has; an unknown adapter changes nothing."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling[adapter]

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None puts back those of their configurations."""
        for name in self.active_adapters:
            if name in self.lora_A:
                self.scaling[name] = self._configured_scaling[name] if scale is None else self.scaling[name] / scale

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Refused: adapters are added before :func:`~fusedonemoe.integrations.peft.from_peft` takes all of them over."""
        raise ValueError(f"{adapter_name!r} must be added to experts before from_peft takes their adapters over")


class HeldAdapters(AdapterLevel, nn.Module):
    """The adapters of the parameter that was registered first; the module around it computes with them."""

    def __init__(self, wrapper: Any) -> None:
        nn.Module.__init__(self)
        self._take(wrapper)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the module around it merges these, too."""

    def unmerge(self) -> None:
        """Do nothing."""

    def forward(self, *args: Any) -> Tensor:
        """Refused: half of an adapter."""
        raise RuntimeError("these adapters are one half of those of the experts, which the module around them computes with")


def _view(target: str, index: int) -> Any:
    """:class:`~fusedonemoe.LoRAExperts`' parameter of this name, as a view of PEFT's matrix."""
    return property(lambda self: self.factors(target)[index] if target in self.targets else None)


class PeftExperts(AdapterLevel, LoRAExperts):
    """Experts with the adapters of a ``PeftModel``, which PEFT goes on to switch, train, save, load, merge and delete.

    The parameters are PEFT's own: ``lora_A.<adapter>.weight`` ``[E * r, in]``, ``lora_B.<adapter>.weight`` ``[out, r * E]``, and
    those of the other projection behind ``base_layer``. :meth:`factors` gives the active ones by expert, as views.
    ``wrapper`` is PEFT's outermost ``ParamWrapper`` around the experts; without ``adapter`` the active adapters stay active.
    """

    def __init__(self, wrapper: Any, form: ExpertsForm, adapter: str | None = None) -> None:
        nn.Module.__init__(self)
        self.form = form
        self._originals = {}
        self._merging: list[str] | None = None
        self._take(wrapper)
        self.base.requires_grad_(False)
        if adapter is not None:
            for level in self._levels():
                level._active_adapter = [adapter]
        self.register_state_dict_pre_hook(refuse_merged)
        self.register_load_state_dict_pre_hook(refuse_merged)

    def _levels(self) -> Iterator[Any]:
        level: Any = self
        while isinstance(level, AdapterLevel):
            yield level
            level = level.base_layer

    def _level(self, target: str) -> Any:
        name = self.form.name(target)
        return next((level for level in self._levels() if level.parameter_name == name), None)

    def _adapters(self, target: str) -> list[str]:
        level = self._level(target)
        names = self.active_adapters if self._merging is None else self._merging
        return [] if level is None else [name for name in names if name in level.lora_A]

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        """The experts themselves."""
        return self.get_base_layer()

    @property
    def targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """The projections that an active adapter changes."""
        return tuple(target for target in TARGETS if self._adapters(target))

    @property
    def r(self) -> dict[str, int]:  # type: ignore[override]
        """The rank of each target; of several active adapters, that of all together."""
        return {target: self.factors(target)[0].shape[1] for target in self.targets}

    @property
    def alpha(self) -> dict[str, float]:  # type: ignore[override]
        """Scale times rank."""
        return {target: scale * self.r[target] for target, scale in self.scale.items()}

    use_rslora: Any = False  # alpha follows from the scale, whichever way PEFT came to that

    @property
    def scale(self) -> dict[str, float]:
        """PEFT's ``scaling``; 1 for several active adapters, whose own are in ``B``."""
        chosen = {target: self._adapters(target) for target in self.targets}
        return {t: self._level(t).scaling[names[0]] if len(names) == 1 else 1.0 for t, names in chosen.items()}

    merged: Any = LoRAExperts.merged  # PEFT asks for merged_adapters

    @property
    def _adapts(self) -> bool:
        return not (self.merged or self._disable_adapters) and bool(self.targets)

    def factors(self, target: str) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of a target, views of PEFT's matrices; of several active adapters, side by side."""
        names, level = self._adapters(target), self._level(target)
        if not names:
            raise ValueError(f"target must be one of {self.targets}, got {target!r}")
        pairs = [split_factors(level.lora_A[n].weight, level.lora_B[n].weight, level.num_experts) for n in names]
        if len(pairs) == 1:
            return pairs[0]
        scaled = [B * level.scaling[name] for (_, B), name in zip(pairs, names, strict=True)]
        return torch.cat([A for A, _ in pairs], dim=1), torch.cat(scaled, dim=2)

    gate_up_lora_A: Tensor | None = _view("gate_up", 0)
    gate_up_lora_B: Tensor | None = _view("gate_up", 1)
    down_lora_A: Tensor | None = _view("down", 0)
    down_lora_B: Tensor | None = _view("down", 1)

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero, for the active adapters."""
        for target in self.targets:
            level = self._level(target)
            for name in self._adapters(target):
                A = level.lora_A[name].weight
                uniform_by_fan_in(A, A.shape[1])
                nn.init.zeros_(level.lora_B[name].weight)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, *, adapter_names: Sequence[str] | None = None) -> Tensor:
        """Run each row of ``x`` through its experts, adapted unless PEFT has disabled that, and sum by weight."""
        if adapter_names is not None:
            raise ValueError("adapter_names must be None: a batch of experts has one choice of adapters for all rows")
        if self._disable_adapters and self.merged:  # merged while they were disabled
            if torch.compiler.is_compiling():
                raise RuntimeError("the adapters are disabled and merged at once: call unmerge_adapter() before compiling")
            self.unmerge()
        return super().forward(x, experts, weights)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; to be off, merged ones are taken out of the base, and to be on they stay in it."""
        if enabled:
            super().set_adapter(self.active_adapters)
            self._disable_adapters = False
            return
        if self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **options: Any) -> None:
        """Choose the active adapters by PEFT's names; one that the experts do not have leaves them as the base is."""
        if self.merged:
            self.unmerge()
        super().set_adapter(adapter_names, *args, **options)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} must not be merged to be deleted: call unmerge_adapter() first")
        super().delete_adapter(adapter_name)

    @contextmanager
    def _merging_these(self, names: list[str] | None, safe: bool) -> Iterator[None]:
        self._merging = names
        try:
            if safe and not all(bool(weight.isfinite().all()) for weight in self.merged_weights().values()):
                raise ValueError(f"the merged weights must be finite, got others with the adapters {self.active_adapters}")
            yield
        finally:
            self._merging = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters, the active ones by default, to the base; :meth:`unmerge` undoes it to the bit.

        With ``safe_merge`` a sum that is not finite raises a ValueError.
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        if self.merged:
            if not set(names) - set(self.merged_adapters):
                notice.warn("the adapters of the experts are merged already, nothing to do", stacklevel=2)
                return
            names = list(dict.fromkeys([*self.merged_adapters, *names]))
            self.unmerge()
        with self._merging_these(names, safe_merge):
            LoRAExperts.merge(self)
        if self.merged:
            for level in self._levels():
                level.merged_adapters = [name for name in names if name in level.lora_A]

    def unmerge(self) -> None:
        """Put the original weights back; a warning where nothing is merged, as in PEFT."""
        if not self.merged:
            notice.warn("the adapters of the experts are not merged, nothing to do", stacklevel=2)
            return
        LoRAExperts.unmerge(self)
        for level in self._levels():
            level.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The experts without adapters, for PEFT's ``unload`` and ``merge_and_unload``."""
        if self.merged:
            self.unmerge()
        with self._merging_these(adapter_names, safe_merge and merge):
            return self.unload(merge=merge)
