"""Layouts of experts' adapters: PEFT's, of all experts side by side, and vLLM's, of a matrix per expert.

PEFT (``target_parameters``) keeps the factors of all experts in two matrices, ``lora_A`` ``[E * r, in]``, in which the expert
is the slow index, and ``lora_B`` ``[out, r * E]``, in which it is the fast one. A module with two adapted parameters is wrapped
twice: the parameter that was registered first is the inner one, ``experts.base_layer.lora_A.weight``, the other has
``experts.lora_A.weight``. vLLM reads that, and a layout of a matrix per expert and projection,
``experts.3.gate_proj.lora_A.weight`` ``[r, in]`` and ``lora_B`` ``[out, r]``, in which gate and up have factors of their own.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedonemoe.checks import check_float
from fusedonemoe.integrations.checkpoints.files import unreadable
from fusedonemoe.layers.form import ExpertsForm
from fusedonemoe.layers.lora import TARGETS, LoRAExperts, pattern_value
from fusedonemoe.ops.activation import join_gate_up, split_gate_up

PREFIX = "base_model.model."
_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<module>.+?)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
PER_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<proj>gate_proj|up_proj|down_proj|w1|w2|w3)")
GATE_UP_DOWN = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def split_factors(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The factors of each expert from PEFT's two matrices, as views.

    ``lora_A`` ``[E * r, in]`` gives ``A`` ``[E, r, in]``, and ``lora_B`` ``[out, r * E]``, in which the expert is the fastest
    index, ``B`` ``[E, out, r]``.

    Raises:
        ValueError: the two do not belong together, or not to as many experts.

    Example:
        >>> import torch
        >>> A, B = split_factors(torch.zeros(4 * 8, 16), torch.zeros(32, 8 * 4), num_experts=4)
        >>> A.shape, B.shape
        (torch.Size([4, 8, 16]), torch.Size([4, 32, 8]))
    """
    if lora_A.dim() != 2 or lora_A.shape[0] == 0 or lora_A.shape[0] % num_experts:
        raise ValueError(f"lora_A must have shape [{num_experts} * r, in], got {tuple(lora_A.shape)}")
    if lora_B.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"lora_B must have shape [out, {lora_A.shape[0]}] to fit lora_A, got {tuple(lora_B.shape)}")
    A = lora_A.reshape(num_experts, -1, lora_A.shape[1])
    B = lora_B.reshape(lora_B.shape[0], -1, num_experts).permute(2, 0, 1)
    return A, B


def join_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's two matrices, contiguous, from the factors of each expert: the inverse of :func:`split_factors`."""
    return A.reshape(-1, A.shape[2]).contiguous(), B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()


class Factors(NamedTuple):
    """An adapter as it was read: factors by expert, and what their product is multiplied with."""

    A: Tensor
    B: Tensor
    scale: float


_REFUSED = ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens", "layer_replication")


def _check_number(name: str, value: Any, kind: Any) -> None:
    """A rank or an alpha, above 0."""
    meaning = "an integer" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"config must have {meaning} for {name}, got {value!r}")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"config must have {meaning} above 0 for {name}, got {value!r}")


class AdapterConfig:
    """The ranks and scales of an adapter's configuration, a mapping or a ``LoraConfig``, checked for what experts do not have."""

    def __init__(self, config: Any) -> None:
        values = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(values, Mapping):
            raise TypeError(f"config must be a mapping or a LoraConfig, got {type(config).__name__}")
        if missing := {"r", "lora_alpha"} - values.keys():
            raise ValueError(f"config must say {sorted(missing)}, got keys {sorted(values)}")
        if refused := [key for key in _REFUSED if values.get(key)]:
            raise ValueError(f"config asks for {refused}, which adapters of experts do not have")
        _check_number("r", values["r"], int)
        _check_number("lora_alpha", values["lora_alpha"], (int, float))
        for field, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            pattern = values.get(field) or {}
            if not isinstance(pattern, Mapping):
                raise TypeError(f"config must have a mapping for {field}, got {type(pattern).__name__}")
            for key, number in pattern.items():
                _check_number(f"{field}[{key!r}]", number, kind)
                try:
                    re.compile(key)
                except (re.error, TypeError) as error:
                    raise ValueError(f"config must have names or regular expressions in {field}, got {key!r}: {error}") from error
        named = values.get("target_parameters")
        if named is not None and not (isinstance(named, list | tuple | set) and all(isinstance(name, str) for name in named)):
            raise TypeError(f"config must have a list of names for target_parameters, got {named!r}")
        self.values: Mapping[str, Any] = values

    def rank_and_scale(self, parameter: str) -> tuple[int, float]:
        """The rank of a parameter's adapter, and what its product is multiplied with."""
        values = self.values
        rank = pattern_value(values.get("rank_pattern"), parameter, values["r"])
        alpha = pattern_value(values.get("alpha_pattern"), parameter, values["lora_alpha"])
        return rank, alpha / (rank**0.5 if values.get("use_rslora") else rank)

    def targets(self, name: str, form: ExpertsForm) -> tuple[str, ...] | None:
        """Return the projections of a module that it names; None if it names no parameters at all."""
        named = self.values.get("target_parameters")
        if not named:
            return None
        full = {target: f"{name}.{form.name(target)}" for target in TARGETS}
        return tuple(t for t, path in full.items() if any(path == key or path.endswith(f".{key}") for key in named))


def sort_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """``{module: {"A": ..., "B": ...}}``, and the keys that are no adapter's."""
    modules: dict[str, dict[str, Tensor]] = {}
    others, adapters = [], set()
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            raise TypeError(f"an adapter must have strings for names, got {key!r}")
        if (match := _KEY.fullmatch(key)) is None:
            others.append(key)
            continue
        check_float(key, tensor)
        if why := unreadable(tensor):
            raise TypeError(f"{key} must be {why}")
        adapters.add(match["adapter"])
        modules.setdefault(match["module"], {})[match["factor"]] = tensor
    if len(adapters) > 1:
        raise ValueError(f"the state dict must hold one adapter, got {sorted(map(str, adapters))}")
    for module, factors in modules.items():
        if factors.keys() != {"A", "B"}:
            raise ValueError(f"{module} must have both lora_A and lora_B, got {sorted(factors)}")
    return modules, others


def read_stacked(
    name: str, form: ExpertsForm, base: nn.Module, found: Mapping[int, dict[str, Tensor]], config: AdapterConfig
) -> dict[str, Factors]:
    """Adapters in PEFT's layout; ``found`` by the number of ``.base_layer`` in their keys."""
    named = config.targets(name, form)
    if named is None:
        if len(found) < 2:
            raise ValueError(f"cannot tell which projection of {name} is adapted: config must name its target_parameters")
        named = TARGETS
    targets = registered_targets(base, form, named)
    if set(found) != set(range(len(targets))):
        wanted = [f"{name}{'.base_layer' * d}.lora_A" for d in range(len(targets))]
        raise ValueError(f"target_parameters {targets} of {name} want {wanted}, got those at depths {sorted(found)}")
    E = getattr(base, form.up).shape[0]
    adapters = {}
    for depth, target in zip(range(len(targets) - 1, -1, -1), targets, strict=True):
        rank, scale = config.rank_and_scale(f"{name}.{form.name(target)}")
        A, B = split_factors(found[depth]["A"], found[depth]["B"], E)
        if A.shape[1] != rank:
            raise ValueError(f"{name}.{form.name(target)} must have rank {rank} by the config, got {A.shape[1]}")
        adapters[target] = Factors(A, B, scale)
    return adapters


def _gate_up_from_halves(gate: Factors, up: Factors, layout: str) -> Factors:
    """One adapter of both halves from one of each: of rank r where they share A, else of both ranks together."""
    A, gate_B, up_B = gate.A, gate.B, up.B
    if not torch.equal(gate.A, up.A) or gate.scale != up.scale:
        # A block diagonal B keeps the halves apart; scales that differ go into it.
        A = torch.cat((gate.A, up.A), dim=1)
        gate_B = nn.functional.pad(gate.B, (0, up.B.shape[2]))
        up_B = nn.functional.pad(up.B * (up.scale / gate.scale), (gate.B.shape[2], 0))
    return Factors(A, join_gate_up(gate_B.mT, up_B.mT, layout).mT, gate.scale)


def read_per_expert(
    name: str, form: ExpertsForm, base: nn.Module, found: Mapping[tuple[str, int], dict[str, Tensor]], config: AdapterConfig
) -> dict[str, Factors]:
    """Adapters in the layout of a matrix per expert; ``found`` by projection and expert."""
    E = getattr(base, form.up).shape[0]
    stacked = {}
    for proj in dict.fromkeys(proj for proj, _ in found):
        present = {expert for other, expert in found if other == proj}
        if present != set(range(E)):
            raise ValueError(f"{name} must have {proj} of the experts 0 to {E - 1}, got those of {sorted(present)}")
        parts = [found[proj, e] for e in range(E)]
        settings = {config.rank_and_scale(f"{name}.{e}.{proj}") for e in range(E)}
        if len({part["A"].shape for part in parts}) > 1 or len(settings) > 1:
            raise ValueError(f"the experts of {name} must have one rank and one scale for {proj}, got several")
        rank, scale = settings.pop()
        if parts[0]["A"].shape[0] != rank:
            raise ValueError(f"{name}.{proj} must have rank {rank} by the config, got {parts[0]['A'].shape[0]}")
        stacked[proj] = Factors(torch.stack([p["A"] for p in parts]), torch.stack([p["B"] for p in parts]), scale)
    adapters = {"down": stacked["down_proj"]} if "down_proj" in stacked else {}
    ups = stacked.keys() - {"down_proj"}
    if ups and ups != ({"gate_proj", "up_proj"} if form.gated else {"up_proj"}):
        raise ValueError(f"{name} must have adapters of both gate_proj and up_proj, or of neither, got {sorted(ups)}")
    if ups:
        up = stacked["up_proj"]
        adapters["gate_up"] = _gate_up_from_halves(stacked["gate_proj"], up, form.gate_up_layout) if form.gated else up
    return adapters


def registered_targets(base: nn.Module, form: ExpertsForm, targets: tuple[str, ...]) -> list[str]:
    """The targets in the order in which their parameters were registered, in which PEFT wraps them."""
    names = [name for name, _ in base.named_parameters(recurse=False)]
    return sorted(targets, key=lambda target: names.index(form.name(target)))


def write_stacked(name: str, module: LoRAExperts) -> Iterator[tuple[str, Tensor]]:
    """A module's adapters under PEFT's keys, without their prefix."""
    wrapped = name + ".base_layer" * (len(module.targets) - 1)
    for target in registered_targets(module.base, module.form, module.targets):
        A, B = module.factors(target)
        for letter, matrix in zip("AB", join_factors(A.detach(), B.detach()), strict=True):
            yield f"{wrapped}.lora_{letter}.weight", matrix
        wrapped = wrapped.removesuffix(".base_layer")


def write_per_expert(name: str, module: LoRAExperts) -> Iterator[tuple[str, Tensor]]:
    """A module's adapters as a matrix per expert and projection, without the keys' prefix; gate and up share their A."""
    projections: dict[str, tuple[Tensor, Tensor]] = {}
    for target in module.targets:
        A, B = (factor.detach() for factor in module.factors(target))
        if target == "down":
            projections["down_proj"] = (A, B)
        elif module.form.gated:
            gate, up = split_gate_up(B.mT, module.form.gate_up_layout)
            projections |= {"gate_proj": (A, gate.mT), "up_proj": (A, up.mT)}
        else:
            projections["up_proj"] = (A, B)
    for proj, factors in projections.items():
        for letter, stacked in zip("AB", factors, strict=True):
            for e, matrix in enumerate(stacked.unbind()):
                # A copy each: gate and up share theirs, and a file must not hold one memory twice.
                yield f"{name}.{e}.{proj}.lora_{letter}.weight", matrix.clone(memory_format=torch.contiguous_format)
