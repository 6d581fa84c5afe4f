"""Routers: find the rule that a router's forward computes by trying this library's rules, and replace the forward by it.

The forward of the router's instance is replaced, not the whole sparse block and not a class. The block's own forward
goes on calling the router and the experts as modules, so whatever hangs on them keeps working: hooks that record router
logits, parallel plans, adapters on the weight, gradient checkpointing, shared experts, names in a ``state_dict``.
"""

import copy
import inspect
import itertools
import types
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fusedonemoe.functional.routing import route_by
from fusedonemoe.integrations.transformers import wrapping
from fusedonemoe.ops.rules import NORM_EPS, RouteRule, check_rule

_PLAN = "_fusedonemoe_plan"
_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_BIAS_BUFFER = "e_score_correction_bias"
# Scorings, and what transformers' routers add to the sum of scores before they divide by it: 1e-6 in LFM2's.
_SCORINGS = (("softmax", NORM_EPS), ("sigmoid", NORM_EPS), ("sigmoid", 1e-6))
# What this library and accelerate keep on a router's instance; accelerate's hook leads to every weight of the model.
_OTHERS = ("forward", _PLAN, "_old_forward", "_hf_hook")
_TOKENS = 96
_RELATIVE_ERROR = 1e-4
# On CPU, outside a graph, the half dozen operators of a router's own forward were measured faster than the checks and calls of
# this library's below about so many logits: 64 tokens and 128 experts. The two compute the same, so either may be taken.
FEWEST_LOGITS = 1 << 13


class RouterPlan(NamedTuple):
    """The steps from a router's input to its logits, and from these to its outputs."""

    linear: str  # name of the child that makes the logits; empty for the router's own weight and bias
    has_bias: bool  # the router has a bias of its own; looking up a missing attribute on a module is slow
    bias: str  # source of the selection bias: "", "buffer" or "argument"
    num_experts: int  # number of logits of a token
    rule: RouteRule  # from logits to weights and ids
    wide: bool = False  # the logits are a float32 product, whatever the dtype of the input
    autocast: bool = True  # autocast may lower that product
    float_logits: bool = False  # the logits are cast to float32
    weights_like: str = "input"  # dtype of the weights: that of the "input" or of the "logits", or "float32"
    flattens: bool = True  # leading dimensions are flattened away
    # Owner, name and value of what the router's code read when it was tried. The plan is valid for these values only.
    settings: tuple[tuple[str, str, Any], ...] = ()

    def __str__(self) -> str:
        rule = self.rule
        order = rule.scoring if rule.score_first else f"{rule.scoring} of the picked"
        extras = [
            f"top {rule.top_k}" + (f" in {rule.topk_group} of {rule.n_group} groups" if rule.n_group > 1 else ""),
            *(["with a selection bias"] if self.bias else []),
            *(["normalised"] if rule.norm_topk_prob else []),
        ]
        return ", ".join([order, *extras])


def _logits(plan: RouterPlan, router: Any, x: Tensor) -> Tensor:
    """The logits, as the router's own forward makes them."""
    if plan.linear:
        child = getattr(router, plan.linear)
        logits = child(x if x.dtype == child.weight.dtype else x.to(child.weight.dtype))
    else:
        weight, bias = router.weight, router.bias if plan.has_bias else None
        if plan.wide:
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        if plan.autocast:
            logits = nn.functional.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias)
        else:
            with torch.autocast(x.device.type, enabled=False):
                logits = nn.functional.linear(x, weight, bias)
    return logits.float() if plan.float_logits else logits


def _outputs(plan: RouterPlan, router: Any, hidden_states: Tensor, *arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    flatten = plan.flattens and hidden_states.dim() != 2
    x = hidden_states.reshape(-1, hidden_states.shape[-1]) if flatten else hidden_states
    logits = _logits(plan, router, x)
    bias = None
    if plan.bias:
        bias = getattr(router, _BIAS_BUFFER) if plan.bias == "buffer" else arguments[0]
    if logits.shape[-1] != plan.num_experts:  # the router has other parameters than when it was tried
        check_rule(plan.rule, logits.shape[-1], bias is not None)
    weights, experts = route_by(plan.rule, logits, bias, "auto")
    dtype = {"input": hidden_states.dtype, "logits": logits.dtype, "float32": torch.float32}[plan.weights_like]
    return logits, weights if weights.dtype == dtype else weights.to(dtype), experts


def forward(self: Any, hidden_states: Tensor, *arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits, weights and ids, by this library's routing; bound to the router in place of its own forward."""
    # By this name, a pickled router comes back with its own: a bound method is pickled as "the object's attribute of the
    # function's name". No functools.partial, which torch.compile guards on the identity of.
    plan = getattr(self, _PLAN, None)
    if plan is None or not _holds(plan, self):  # taken off beneath a later wrapper, or the router was changed since
        return type(self).forward(self, hidden_states, *arguments)
    logits = hidden_states.numel() // hidden_states.shape[-1] * plan.num_experts
    if not torch.compiler.is_compiling() and logits < FEWEST_LOGITS and hidden_states.device.type == "cpu":
        return type(self).forward(self, hidden_states, *arguments)
    return _outputs(plan, self, hidden_states, *arguments)


def fuse_router(router: nn.Module, plan: RouterPlan) -> None:
    """Replace the forward of this one router, or give the one that is there already, beneath a later wrapper, this plan."""
    setattr(router, _PLAN, plan)
    if not wrapping.reaches(router, forward):
        router.forward = types.MethodType(forward, router)


def is_fused(router: nn.Module) -> bool:
    """Return whether this library has replaced the router's forward, here or in the process that pickled it."""
    return _PLAN in vars(router)


def unfuse_router(router: nn.Module) -> None:
    """Give a router its own forward back, beneath the wrappers that others have put around it since."""
    if is_fused(router):
        if _is_unpickled(router):
            del vars(router)["forward"]
        wrapping.remove(router, forward)
        delattr(router, _PLAN)


def _is_unpickled(router: nn.Module) -> bool:
    """Return whether the instance's forward is that of its class, which pickle puts in the place of ours."""
    return is_fused(router) and wrapping.is_bound(vars(router).get("forward"), type(router).forward, router)


@lru_cache(maxsize=256)
def _names_in(kind: type[nn.Module]) -> tuple[str, ...]:
    """Every name that the code of a router's class mentions."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        for name, function in vars(owner).items():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and name != "__init__":
                names.update(code.co_names)
    return tuple(sorted(names - {"training"}))


def _settings_of(router: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """Owner (``""`` or ``"config"``), name and value of each number and word that the router's own code reads."""
    found = []
    for owner, name in itertools.product(("", "config"), _names_in(cast(Any, type(router)))):
        with suppress(Exception):  # a configuration may have a value for each layer, and no common one
            value = getattr(getattr(router, owner) if owner else router, name)
            if isinstance(value, bool | int | float | str):
                found.append((owner, name, value))
    return tuple(found)


def _holds(plan: RouterPlan, router: Any) -> bool:
    """Return whether the router is set as it was when it was tried."""
    return all(getattr(getattr(router, owner) if owner else router, name) == value for owner, name, value in plan.settings)


def find_router(parent: nn.Module | None, experts: nn.Module) -> tuple[nn.Module | None, RouterPlan | str]:
    """Return the router next to an experts module, and its plan, or why it has none."""
    children = [] if parent is None else [wrapping.inside(child) for child in parent.children()]
    beside = [m for m in children if m is not experts and _top_k(m) and _linear(m) is not None]
    if len(beside) != 1:
        return None, f"{len(beside)} routers found beside the experts" if beside else "no router found beside the experts"
    router = beside[0]
    ours = _is_unpickled(router) or wrapping.reaches(router, forward)
    if "forward" in vars(router) and not ours:
        if _PLAN in vars(router):
            return router, "its forward was replaced after this library fused it, by something that cannot be looked into"
        return router, "its forward was replaced already"
    if any(p.is_meta for p in router.parameters()):
        # Off-loaded since it was tried, unless it was changed: nothing can be tried now.
        plan: RouterPlan | None = getattr(router, _PLAN, None)
        return router, plan if plan is not None and _holds(plan, router) else "its weights are on the meta device"
    return router, _plan_of(router)


def _top_k(module: nn.Module) -> int:
    value = getattr(module, "top_k", 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _linear(module: nn.Module) -> str | None:
    """Return the owner of the router's matrix: ``""`` for the router, or the name of its only child; None for neither."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return "" if weight.dim() == 2 else None
    children = dict(module.named_children())
    name, child = next(iter(children.items())) if len(children) == 1 else ("", None)
    return name if isinstance(child, nn.Linear) else None


def _takes_bias(router: nn.Module) -> bool | None:
    """Return whether the forward takes a selection bias after the input; None where it takes more, or other arguments."""
    parameters = list(inspect.signature(type(router).forward).parameters.values())[2:]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) or len(parameters) > 1:
        return None
    return "bias" in parameters[0].name or None if parameters else False


class _Probe(NamedTuple):
    """A copy of a router with random weights, and inputs that tell rules apart."""

    router: nn.Module
    x: Tensor
    arguments: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> "_Probe":
        router = copy.deepcopy(self.router).to(dtype)
        return _Probe(router, self.x.to(dtype), tuple(argument.to(dtype) for argument in self.arguments))


def _make_probe(router: nn.Module, takes_bias: bool) -> _Probe:
    """Every tensor is drawn anew: a bias of zeros, as it is before training, would hide whether it is used."""
    bare = copy.copy(router)
    for name in _OTHERS:
        bare.__dict__.pop(name, None)
    clone = copy.deepcopy(bare).to("cpu", torch.float32).requires_grad_(False)
    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    linear = _linear(clone)
    weight: Any = getattr(clone, linear).weight if linear else clone.weight
    for tensor in itertools.chain(clone.parameters(), clone.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(draw(*tensor.shape))
    E, D = weight.shape
    # Logits of order one, beside a part that all experts share: the second half of the tokens has every logit near -20, where
    # a sum of scores is small enough to show what is added to it before the division.
    common = torch.nn.functional.normalize(draw(D), dim=0)
    weight.copy_((weight - (weight @ common)[:, None] * common) * D**-0.5 + common)
    x = draw(_TOKENS, D)
    x -= (x @ common)[:, None] * common
    x[_TOKENS // 2 :] -= 20 * common
    return _Probe(clone, x, (draw(E),) if takes_bias else ())


def _candidates(router: nn.Module, linear: str, takes_bias: bool, num_experts: int) -> Iterator[RouterPlan]:
    """Every rule that the router's attributes do not rule out, the likelier first."""
    top_k = _top_k(router)
    norm = getattr(router, "norm_topk_prob", None)
    norms = (norm,) if isinstance(norm, bool) else (True, False)
    scale = next((float(value) for name in _SCALES if isinstance(value := getattr(router, name, None), int | float)), 1.0)
    groups = next((value for name in ("num_group", "n_group") if isinstance(value := getattr(router, name, None), int)), 1)
    kept = getattr(router, "topk_group", None)
    group_rules = [(1, 1, "max")]
    if groups > 1 and isinstance(kept, int) and num_experts % groups == 0:
        group_rules = [(groups, kept, score) for score in ("top2_sum", "max")] + group_rules
    has_bias = not linear and isinstance(getattr(router, "bias", None), Tensor)
    biases = ["argument"] if takes_bias else []
    biases += ["buffer"] if isinstance(getattr(router, _BIAS_BUFFER, None), Tensor) else []
    for group, bias, (scoring, eps), first, normalise, factor in itertools.product(
        group_rules, [*biases, ""], _SCORINGS, (True, False), (*norms, False, True), (scale, scale / top_k, 1.0)
    ):
        rule = RouteRule(top_k, scoring, first, normalise, factor, *group, eps)
        try:
            check_rule(rule, num_experts, bool(bias))
        except ValueError:  # a rule that these sizes do not have
            continue
        yield RouterPlan(linear, has_bias, bias, num_experts, rule)


def _dense(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """``[..., E]``: the order of a token's experts has no meaning."""
    dense = torch.zeros(*weights.shape[:-1], num_experts, dtype=torch.float32, device=weights.device)
    return dense.scatter(-1, experts, weights.float())


def _same_routing(plan: RouterPlan, probe: _Probe, own: tuple[Tensor, ...]) -> bool:
    logits, weights, experts = own
    bias = getattr(probe.router, _BIAS_BUFFER) if plan.bias == "buffer" else None
    bias = probe.arguments[0] if plan.bias == "argument" else bias
    ours = _dense(*route_by(plan.rule, logits, bias, "auto"), logits.shape[-1])
    theirs = _dense(weights, experts, logits.shape[-1])
    return bool(((ours - theirs).abs() <= _RELATIVE_ERROR * theirs).all())


def _modes(plan: RouterPlan) -> Iterator[RouterPlan]:
    """The plan with every way to choose dtypes."""
    flags = (False, True)
    for wide, autocast, float_logits, like in itertools.product(flags, flags[::-1], flags, ("input", "logits", "float32")):
        if not (plan.linear and (wide or not autocast)):
            yield plan._replace(wide=wide, autocast=autocast, float_logits=float_logits, weights_like=like)


def _same_dtypes(plan: RouterPlan, probe: _Probe, own: tuple[Tensor, ...], autocast: bool) -> bool:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        try:
            ours = _outputs(plan, probe.router, probe.x, *probe.arguments)
        except RuntimeError:  # a product of two dtypes
            return False
    same = all(a.dtype == b.dtype for a, b in zip(ours[:2], own[:2], strict=True))
    return same and torch.equal(ours[0], own[0])


def _own(probe: _Probe, *, autocast: bool = False) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return probe.router(probe.x.clone(), *probe.arguments)


def _plan_of(router: nn.Module) -> RouterPlan | str:
    takes_bias = _takes_bias(router)
    linear = _linear(router)
    if takes_bias is None or linear is None:
        return "its forward takes more than hidden states and a selection bias"
    # A router's own forward may make tensors on the default device, which is another matter than where the probe is.
    on_cpu = torch.device("cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False), on_cpu:
        for dimensions in (2, 3):  # some unpack three, as their block gives them
            try:
                probe = _make_probe(router, takes_bias)
                return _matched(probe if dimensions == 2 else probe._replace(x=probe.x[None]), linear, takes_bias)
            except Exception as raised:  # Other people's code, called as it may not expect: it keeps its forward.
                error = raised
        return f"a copy of it raised {type(error).__name__} on random input"


def _matched(probe: _Probe, linear: str, takes_bias: bool) -> RouterPlan | str:
    router = probe.router
    own = [_own(probe._replace(router=router.train(training))) for training in (True, False)]
    if any(len(outputs) != 3 for outputs in own):
        return f"it returns {len(own[0])} values, where logits, weights and ids were expected"
    num_experts = own[0][0].shape[-1]
    plans = (p for p in _candidates(router, linear, takes_bias, num_experts) if all(_same_routing(p, probe, o) for o in own))
    plan = next(plans, None)
    if plan is None:
        return "none of this library's rules gives the weights that its forward gives"
    plan = plan._replace(
        flattens=own[0][0].dim() == 2 and (probe.x.dim() == 3 or _own(probe._replace(x=probe.x[None]))[0].dim() == 2)
    )
    # Three views of what the dtypes are: float32, bfloat16 where the router can compute in it, and autocast.
    seen = [*((probe, outputs, False) for outputs in own), (probe, _own(probe, autocast=True), True)]
    half = probe.to(torch.bfloat16)
    with suppress(RuntimeError):
        seen.append((half, _own(half), False))
    for candidate in _modes(plan):
        if all(_same_dtypes(candidate, *view) for view in seen):
            return candidate._replace(settings=_settings_of(router))
    return "its logits are no plain product of its input and weight, or its outputs have dtypes of their own"
