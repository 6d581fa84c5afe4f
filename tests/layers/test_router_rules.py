"""The rule of a router: one list of fields, which are set in any order and checked at the next call."""

import copy
import inspect
import pickle

import pytest
import torch

from fusedonemoe import MoEConfig, TopKRouter, functional
from fusedonemoe.ops.rules import ROUTE_OPTIONS, RouteAttributes, RouteOptions, RouteRule


def test_every_form_of_a_routing_rule_has_the_same_fields():
    renamed = ["routed_scaling_factor" if name == "scale" else name for name in RouteRule._fields]
    assert renamed == ["top_k", *ROUTE_OPTIONS] == list(RouteAttributes.__annotations__)
    assert list(RouteOptions.__annotations__) == list(ROUTE_OPTIONS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_p'"):
        functional.route(torch.zeros(1, 4), 2, top_p=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_p'"):
        TopKRouter(16, 8, 2, top_p=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("public", [functional.route, TopKRouter, MoEConfig])
def test_every_field_of_a_routing_rule_is_an_argument(public):
    options = {"top_k", *ROUTE_OPTIONS}
    assert len(options) == len(RouteRule._fields)
    assert options <= set(inspect.signature(public).parameters)


def test_fields_of_a_routers_rule_are_set_in_any_order():
    x = torch.randn(3, 16)
    router = TopKRouter(16, 8, 2, n_group=4, topk_group=2)
    router.n_group = 1
    router.topk_group = 1
    assert router(x).experts.shape == (3, 2)
    router = TopKRouter(16, 8, 2, scoring="sigmoid", norm_eps=1e-6)
    router.scoring = "softmax"
    with pytest.raises(ValueError, match="norm_eps applies only to scoring='sigmoid'"):
        router(x)
    router.norm_eps = 1e-20
    assert router(x).experts.shape == (3, 2)
    router.weight = torch.nn.Parameter(torch.randn(12, 16))
    router.top_k = 10
    assert router(x).experts.shape == (3, 10)


def test_a_router_without_its_checked_rule_makes_it():
    # As of a pickle that an earlier version wrote.
    router, x = TopKRouter(16, 8, 2, scoring="sigmoid"), torch.randn(3, 16)
    expected = router(x)
    for copied in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        vars(copied).pop("_checked")
        assert all(map(torch.equal, copied(x), expected))


def test_setting_a_field_of_a_routers_rule_takes_effect_and_is_checked():
    router, x = TopKRouter(8, 6, 2), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    router.top_k, router.scoring, router.norm_eps, router.routed_scaling_factor = 3, "sigmoid", 0.5, 2.0
    router.n_group, router.topk_group, router.group_score = 2, 1, "max"
    options = {name: getattr(router, name) for name in ROUTE_OPTIONS}
    assert options["norm_eps"] == 0.5 and options["n_group"] == 2
    output = router(x)
    assert all(map(torch.equal, output[1:], functional.route(output.logits, 3, **options)))
    for name, value in (("top_k", 4), ("n_group", 4), ("scoring", "tanh"), ("norm_topk_prob", 1), ("norm_eps", 0.0)):
        before = getattr(router, name)
        setattr(router, name, value)
        with pytest.raises((TypeError, ValueError), match=name):
            router(x)
        setattr(router, name, before)
        assert torch.equal(router(x).weights, output.weights)
    router.n_group, router.top_k = 1, None
    assert router.top_k is None and router(x).experts.shape == (3, 6)
    router.top_k = 2
    router.weight = torch.nn.Parameter(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="top_k must be from 1 to 1"):
        router(x)
