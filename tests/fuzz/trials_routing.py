"""Cases of the routing functions, of what counts ids, and of the balance losses."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedonemoe import functional as F
from fusedonemoe.balance import load_balancing_loss, router_z_loss
from tests.fuzz.bounds import Array, Bounded, work_dtype
from tests.fuzz.draw import DTYPES, Draw, arranged, expert_ids, finite_cast, floats, leading, router_logits, spoilt, token_count
from tests.fuzz.exact_routing import (
    Rule,
    best_pairs,
    logsumexp,
    route,
    route_product_key,
    sigmoid,
    softmax,
    wrong_choices,
)
from tests.fuzz.trial import Expected, Given, Trial, like, routed_like

ROUTING_IMPLEMENTATIONS = ("auto", "dense", "portable")


def drawn_logits(draw: Draw, T: int, *width: int) -> Tensor:
    """Logits ``[..., *width]`` in drawn values, strides and leading dimensions."""
    dtype = draw.pick("dtype", DTYPES)
    logits = router_logits(draw, (T, *width), dtype)
    spoilt(draw, "logits", logits.view(T, math.prod(width)))
    logits = logits.reshape(*leading(draw, T), *width)
    return arranged(draw, "logits", logits)


def drawn_rule(draw: Draw, E: int) -> tuple[Rule, bool]:
    """A rule for E experts, and whether there is a selection bias."""
    scoring = draw.pick("scoring", ("softmax", "sigmoid"))
    divisors = [n for n in (1, 1, 2, 3, 4) if E % n == 0]
    n_group = int(draw.rng.choice(divisors))
    topk_group = int(draw.rng.integers(1, n_group + 1))
    has_bias = draw.pick("selection bias", (False, False, True))
    selectable = E // n_group * topk_group
    top_k: int | None = int(draw.rng.integers(1, selectable + 1))
    if draw.chance(0.3):
        top_k = min(selectable, draw.size(1, 2))
    if n_group == 1 and not has_bias and draw.pick("top_k", ("some", "some", "some", "None")) == "None":
        top_k = None
    return Rule(
        top_k,
        scoring,
        score_first=draw.pick("score_first", (True, True, False)),
        norm_topk_prob=draw.pick("norm_topk_prob", (True, False)),
        routed_scaling_factor=draw.pick("routed_scaling_factor", (1.0, 1.0, 2.5)),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw.pick("group_score", ("top2_sum", "max")),
        norm_eps=draw.pick("norm_eps", (1e-20, 1e-6)) if scoring == "sigmoid" else 1e-20,
    ), has_bias


def drawn_selection_bias(draw: Draw, E: int, dtype: torch.dtype) -> Tensor:
    """Few distinct values, so that keys tie."""
    values = 0.25 * np.round(2 * draw.normal(E)) if draw.chance(0.5) else 0.1 * draw.normal(E)
    return arranged(draw, "selection_bias", finite_cast(values, dtype), ("contiguous", "stepped", "expanded"))


def case_route(draw: Draw) -> Trial:
    """``F.route``."""
    impl, T, E = draw.pick("impl", ROUTING_IMPLEMENTATIONS), token_count(draw), draw.size(1, 2, 3, 4, 6, 8, 8, 12, 17, 64)
    logits = drawn_logits(draw, T, E)
    rule, has_bias = drawn_rule(draw, E)
    inputs = {"logits": logits}
    if has_bias:
        bias_dtype = draw.pick("dtype of selection_bias", (torch.float32, logits.dtype))
        inputs["selection_bias"] = drawn_selection_bias(draw, E, bias_dtype)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        options = rule._asdict()
        return F.route(inputs["logits"], options.pop("top_k"), selection_bias=inputs.get("selection_bias"), impl=impl, **options)

    def exact(given: Given) -> Expected:
        K = rule.top_k or E
        l = given.bounded("logits", logits.dtype, T, E)  # noqa: E741
        ids = given.ids("experts", T, K)
        bias = given.optional("selection_bias", logits.dtype)
        if wrong := wrong_choices(l, bias, ids, rule):
            return Expected({}, wrong=wrong)
        weights, dlogits = route(l, ids, rule, given.gradient("weights", logits.dtype, T, K))
        return Expected({"weights": weights, "experts": ids}, {} if dlogits is None else {"logits": dlogits})

    tokens = {"logits": 1}
    bits = impl == "auto" and logits.dtype != torch.float64
    return Trial(
        *(call, inputs, exact, routed_like(logits, rule.top_k or E), ("logits",), impl),
        tokens=tokens,
        batch_invariant=bits,
    )


def case_topk_softmax(draw: Draw) -> Trial:
    """``F.topk_softmax``."""
    impl, T, E = draw.pick("impl", ROUTING_IMPLEMENTATIONS), token_count(draw), draw.size(1, 2, 5, 8, 16, 31)
    logits, K = drawn_logits(draw, T, E), int(draw.rng.integers(1, E + 1))
    rule = Rule(K, norm_topk_prob=False)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(F.topk_softmax(inputs["logits"], K, impl=impl))

    def exact(given: Given) -> Expected:
        l, ids = given.bounded("logits", logits.dtype, T, E), given.ids("experts", T, K)  # noqa: E741
        if wrong := wrong_choices(l, None, ids, rule):
            return Expected({}, wrong=wrong)
        weights, dlogits = route(l, ids, rule, given.gradient("weights", logits.dtype, T, K))
        places = np.array([[j * T + t for j in range(K)] for t in range(T)], dtype=np.int64).reshape(T, K)
        outputs = {"weights": weights, "experts": ids, "token_expert_indices": places}
        return Expected(outputs, {} if dlogits is None else {"logits": dlogits})

    outputs = routed_like(logits, K)
    outputs["token_expert_indices"] = outputs["experts"]
    return Trial(call, {"logits": logits}, exact, outputs, ("logits",), impl)


def case_route_with_shared(draw: Draw) -> Trial:
    """``F.route_with_shared``."""
    impl, T, E = draw.pick("impl", ROUTING_IMPLEMENTATIONS), token_count(draw), draw.size(1, 2, 3, 5, 8, 13)
    logits, K = drawn_logits(draw, T, E), int(draw.rng.integers(1, E + 1))
    S = int(draw.rng.integers(0, K + 1))
    R = E - S
    norm, has_bias = draw.pick("norm_topk_prob", (True, False)), draw.pick("selection bias", (False, True))
    rule = Rule(K - S, norm_topk_prob=norm)
    inputs = {"logits": logits}
    if has_bias:
        inputs["selection_bias"] = drawn_selection_bias(draw, E, torch.float32)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        bias = inputs.get("selection_bias")
        return F.route_with_shared(inputs["logits"], K, S, selection_bias=bias, norm_topk_prob=norm, impl=impl)

    def exact(given: Given) -> Expected:
        l, ids = given.bounded("logits", logits.dtype, T, E), given.ids("experts", T, K)  # noqa: E741
        bias, dweights = given.optional("selection_bias", logits.dtype), given.gradient("weights", logits.dtype, T, K)
        weight_bound, logit_bound = np.zeros((2, T, K)), np.zeros((2, T, E))
        if K > S:
            routed = ids[:, : K - S]
            if wrong := wrong_choices(l[:, :R], None if bias is None else bias[:R], routed, rule):
                return Expected({}, wrong=wrong)
            weights, dl = route(l[:, :R], routed, rule, None if dweights is None else dweights[:, : K - S])
            weight_bound[:, :, : K - S] = weights.value, weights.error
            if dl is not None:
                logit_bound[:, :, :R] = dl.value, dl.error
        if S:
            everything = np.tile(np.arange(S), (T, 1))
            weights, dl = route(
                l[:, R:], everything, Rule(None, norm_topk_prob=False), None if dweights is None else dweights[:, K - S :]
            )
            weight_bound[:, :, K - S :] = weights.value, weights.error
            if dl is not None:
                logit_bound[:, :, R:] = dl.value, dl.error
        wanted = np.concatenate((ids[:, : K - S], np.tile(np.arange(R, E), (T, 1))), 1)
        gradients = {} if dweights is None else {"logits": Bounded(logit_bound[0], logit_bound[1], l.work)}
        return Expected({"weights": Bounded(weight_bound[0], weight_bound[1], l.work), "experts": wanted}, gradients)

    return Trial(call, inputs, exact, routed_like(logits, K), ("logits",), impl)


def case_route_top_p(draw: Draw) -> Trial:
    """``F.route_top_p``."""
    T, E = token_count(draw), draw.size(1, 2, 4, 8, 19)
    logits = drawn_logits(draw, T, E)
    top_p, temperature = draw.pick("top_p", (0.0, 0.05, 0.3, 0.9)), draw.pick("temperature", (1.0, 0.5, 3.0))

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return F.route_top_p(inputs["logits"], top_p, temperature=temperature)

    def exact(given: Given) -> Expected:
        l, ids = given.bounded("logits", logits.dtype, T, E), given.ids("experts", T, E)  # noqa: E741
        # softmax(l / temperature): the difference is divided, not the logits, so that large ones lose nothing.
        below = l.value - _top(l.value)
        scaled = Bounded(below / temperature, l.work.unit * np.abs(below) / temperature, l.work)
        p, kept = softmax(scaled), ids >= 0
        own = np.tile(np.arange(E), (T, 1))
        wrong = ["an id is neither its column's nor -1"] if ((ids != own) & kept).any() else []
        known = np.isfinite(p.error)
        if ((p.value - top_p > 2 * p.error) & known & ~kept).any() or ((top_p - p.value > 2 * p.error) & known & kept).any():
            wrong.append(f"ids {ids.tolist()} do not follow from p = {p.value.tolist()}")
        s, dweights = sigmoid(l), given.gradient("weights", logits.dtype, T, E)
        weights = Bounded(np.where(kept, s.value, 0), np.where(kept, s.error, 0), l.work)
        gradients = {}
        if dweights is not None:
            dl = dweights * s * (1 - s)
            gradients["logits"] = Bounded(np.where(kept, dl.value, 0), np.where(kept | np.isnan(l.value), dl.error, 0), l.work)
        return Expected({"weights": weights, "experts": ids}, gradients, wrong)

    return Trial(call, {"logits": logits}, exact, routed_like(logits, E), ("logits",), "auto")


def _top(values: Array) -> Array:
    finite = np.where(np.isfinite(values), values, -np.finfo(np.float64).max)
    return finite.max(-1, keepdims=True)


def case_route_product_key(draw: Draw) -> Trial:
    """``F.route_product_key``."""
    impl, T, G = draw.pick("impl", ROUTING_IMPLEMENTATIONS), token_count(draw), draw.size(1, 2, 3, 4, 7, 11)
    K, norm = min(G * G, int(draw.rng.integers(1, 20))), draw.pick("norm_topk_prob", (True, False))
    logits = drawn_logits(draw, T, 2, G)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return F.route_product_key(inputs["logits"], K, norm_topk_prob=norm, impl=impl)

    def exact(given: Given) -> Expected:
        pairs, ids = given.bounded("logits", logits.dtype, T, 2, G), given.ids("experts", T, K)
        wrong = []
        for t in range(T):
            best = best_pairs(pairs.value[t], K)
            if best is None:
                if not ((ids[t] >= 0) & (ids[t] < G * G)).all():
                    return Expected({}, wrong=[f"token {t}: ids {ids[t].tolist()} are out of range"])
            elif best != ids[t].tolist():
                wrong.append(f"token {t}: ids {ids[t].tolist()}, the best are {best}")
        if wrong:
            return Expected({}, wrong=wrong)
        weights, dlogits = route_product_key(pairs, ids, norm, given.gradient("weights", logits.dtype, T, K))
        return Expected({"weights": weights, "experts": ids}, {} if dlogits is None else {"logits": dlogits})

    return Trial(call, {"logits": logits}, exact, routed_like(logits, K, 2), ("logits",), impl)


def case_apply_capacity(draw: Draw) -> Trial:
    """``F.apply_capacity``."""
    T, E = token_count(draw), draw.size(1, 2, 3, 5, 8)
    K = int(draw.rng.integers(1, E + 1))
    factor = draw.pick("capacity_factor", (0.3, 1.0, 1.1, 2 / 3, 4.0))
    shape = leading(draw, T)
    inputs = {
        "experts": arranged(draw, "experts", expert_ids(draw, T, K, E).reshape(*shape, K)),
        "weights": arranged(draw, "weights", floats(draw, "weights", (T, K), draw.pick("dtype", DTYPES)).reshape(*shape, K)),
    }

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return F.apply_capacity(inputs["experts"], inputs["weights"], E, factor)

    def exact(given: Given) -> Expected:
        ids, dtype = given.ids("experts", T, K), inputs["weights"].dtype
        # 1.1 and 2 / 3 mean just that, so the capacity is that of the nearest simple fraction.
        capacity = math.ceil(Fraction(factor).limit_denominator(1000) * T * K / E)
        taken, kept = [0] * E, np.ones((T, K), dtype=bool)
        for t in range(T):
            for j in range(K):
                if 0 <= (e := int(ids[t, j])) < E:
                    kept[t, j], taken[e] = taken[e] < capacity, taken[e] + 1
        weights = given.bounded("weights", dtype, T, K)
        outputs = {
            "experts": np.where(kept, ids, -1),
            "weights": Bounded(np.where(kept, weights.value, 0), None, weights.work),
            "dropped": np.array((~kept).sum()),
        }
        dweights = given.gradient("weights", dtype, T, K)
        gradients = {} if dweights is None else {"weights": Bounded(np.where(kept, dweights.value, 0), None, weights.work)}
        return Expected(outputs, gradients)

    signed = torch.int64 if inputs["experts"].dtype == torch.uint8 else inputs["experts"].dtype
    outputs = {
        "experts": like(signed, inputs["experts"].shape),
        "weights": like(inputs["weights"].dtype, inputs["weights"].shape),
        "dropped": like(torch.int64, ()),
    }
    return Trial(call, inputs, exact, outputs, ("weights",), "auto")


def case_counts(draw: Draw) -> Trial:
    """``F.plan`` and ``F.tokens_per_expert``."""
    T, E = token_count(draw), draw.size(1, 2, 3, 7, 64)
    K = int(draw.rng.integers(1, min(E, 12) + 1))
    inputs = {"experts": arranged(draw, "experts", expert_ids(draw, T, K, E).reshape(*leading(draw, T), K))}

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (*F.plan(inputs["experts"], E), F.tokens_per_expert(inputs["experts"], E))

    def exact(given: Given) -> Expected:
        flat = given.ids("experts", T * K).tolist()
        mine = [[n for n, e in enumerate(flat) if e == expert] for expert in range(E)]
        absent = [n for n, e in enumerate(flat) if not 0 <= e < E]
        counts = np.array([len(rows) for rows in mine])
        order = np.array([n for rows in (*mine, absent) for n in rows], dtype=np.int64)
        return Expected({"order": order, "offsets": np.concatenate(([0], counts.cumsum())), "counts": counts})

    outputs = {
        "order": like(torch.int32, (T * K,)),
        "offsets": like(torch.int32, (E + 1,)),
        "counts": like(torch.int64, (E,)),
    }
    return Trial(call, inputs, exact, outputs, (), "auto")


def _masked(draw: Draw, inputs: dict[str, Tensor], T: int) -> None:
    """Adds an attention mask, or none."""
    kind = draw.pick("attention_mask", ("none", "bool", "int64", "float32", "all 0"))
    if kind != "none":
        mask = torch.from_numpy(draw.rng.random(T) < (0.7 if kind != "all 0" else 0))
        dtype = {"bool": torch.bool, "float32": torch.float32}.get(kind, torch.int64)
        inputs["attention_mask"] = arranged(draw, "attention_mask", mask.to(dtype), ("contiguous", "stepped"))


def _counted(given: Given, T: int) -> Any:
    mask = given.inputs.get("attention_mask")
    return np.ones(T, dtype=bool) if mask is None else (mask != 0).numpy()


def case_load_balancing_loss(draw: Draw) -> Trial:
    """``balance.load_balancing_loss``."""
    T, E = token_count(draw), draw.size(1, 2, 4, 9)
    K = int(draw.rng.integers(1, E + 1))
    scoring = draw.pick("scoring", ("softmax", "sigmoid", "given"))
    logits = drawn_logits(draw, T, E)
    if scoring == "given":
        logits = logits.abs().clamp(max=1)
    inputs = {"logits": logits, "experts": expert_ids(draw, T, K, E).reshape(*logits.shape[:-1], K)}
    _masked(draw, inputs, T)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        mask = inputs.get("attention_mask")
        return (load_balancing_loss(inputs["logits"], inputs["experts"], E, scoring=scoring, attention_mask=mask),)

    def exact(given: Given) -> Expected:
        counted, ids = _counted(given, T), given.ids("experts", T, K)
        l = given.bounded("logits", logits.dtype, T, E)[counted]  # noqa: E741
        n = max(int(counted.sum()), 1)
        share = np.array([(ids[counted] == e).sum() for e in range(E)]) / (n * K)
        own = l
        if scoring == "softmax":
            p = softmax(l)
        elif scoring == "sigmoid":
            own = l.apply(lambda v: -np.logaddexp(0, -np.clip(v, -1e300, None)))
            p = softmax(own)
        else:
            p = l
        coefficients = Bounded(np.broadcast_to(share * E / n, p.value.shape), None, l.work)
        loss = (p * coefficients).reshape(-1).sum(0)
        gradients = {}
        dloss = given.gradient("loss", logits.dtype)
        if dloss is not None:
            dp = coefficients * dloss
            if scoring != "given":
                dp = p * (dp - (dp * p).sum(1, keepdims=True))
            if scoring == "sigmoid":  # the derivative of log sigmoid(l) is sigmoid(-l)
                dp = dp * sigmoid(-l)
            value, error = np.zeros((2, T, E))
            value[counted], error[counted] = dp.value, dp.error
            gradients["logits"] = Bounded(value, error, l.work)
        return Expected({"loss": loss}, gradients)

    return Trial(call, inputs, exact, {"loss": like(work_dtype(logits.dtype), ())}, ("logits",), "auto")


def case_router_z_loss(draw: Draw) -> Trial:
    """``balance.router_z_loss``."""
    T, E = token_count(draw), draw.size(1, 2, 4, 9)
    logits = drawn_logits(draw, T, E)
    inputs = {"logits": logits}
    _masked(draw, inputs, T)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (router_z_loss(inputs["logits"], attention_mask=inputs.get("attention_mask")),)

    def exact(given: Given) -> Expected:
        counted = _counted(given, T)
        l = given.bounded("logits", logits.dtype, T, E)[counted]  # noqa: E741
        n = max(int(counted.sum()), 1)
        z = logsumexp(l)
        gradients = {}
        dloss = given.gradient("loss", logits.dtype)
        if dloss is not None:
            dl = softmax(l) * (z * (2 / n) * dloss).reshape(-1, 1)
            dl = dl.forget(z.value[:, None] ** 2 > z.work.most)  # the loss itself overflows
            value, error = np.zeros((2, T, E))
            value[counted], error[counted] = dl.value, dl.error
            gradients["logits"] = Bounded(value, error, l.work)
        return Expected({"loss": (z * z).sum(0) / n}, gradients)

    return Trial(call, inputs, exact, {"loss": like(work_dtype(logits.dtype), ())}, ("logits",), "auto")


CASES = {
    "route": (case_route, 4),
    "topk_softmax": (case_topk_softmax, 1),
    "route_with_shared": (case_route_with_shared, 1),
    "route_top_p": (case_route_top_p, 1),
    "route_product_key": (case_route_product_key, 2),
    "apply_capacity": (case_apply_capacity, 1),
    "plan, tokens_per_expert": (case_counts, 1),
    "load_balancing_loss": (case_load_balancing_loss, 1),
    "router_z_loss": (case_router_z_loss, 1),
}
