"""Routing: from logits to weights and ids, the plan that sorts them, and functions that change a routing."""

import torch

from fusedonemoe import functional as F
from fusedonemoe import testing

from .subjects import DEVICES, Subject, _Operator, present

T, K = 512, 8


class Route(_Operator):
    """The softmax of Qwen3 and Mixtral, the sigmoid in groups with a bias of DeepSeek-V3, and the other forms."""

    params = (DEVICES, ("softmax E1024", "groups E256", "shared E128", "topk_softmax E128"))

    def subject(self, device, case):
        form, E = case.split(" E")
        E = int(E)
        logits = testing.make_logits(T, E, device=device)
        if form == "groups":
            bias = torch.linspace(-0.1, 0.1, E, device=device)
            options = {"scoring": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}

            def call(logits):
                return F.route(logits, K, selection_bias=bias, **options)[0]
        elif form == "shared":
            route_with_shared = present("functional.route_with_shared")

            def call(logits):
                return route_with_shared(logits, K, 2)[0]
        elif form == "topk_softmax":
            topk_softmax = present("functional.topk_softmax")

            def call(logits):
                return topk_softmax(logits, K).weights
        else:

            def call(logits):
                return F.route(logits, K)[0]

        return Subject(call, (logits,), call)


class ProductKeys(_Operator):
    """T = 4096 tokens to 16 of G * G experts; logits of few values have ties everywhere."""

    params = (DEVICES, ("continuous", "integers"))

    def subject(self, device, case):
        route_product_key = present("functional.route_product_key")
        logits = torch.randn(4096, 2, 128, generator=torch.Generator().manual_seed(0))
        logits = (logits if case == "continuous" else (2 * logits).round()).to(device)

        def call(logits):
            return route_product_key(logits, 16)[0]

        return Subject(call, (logits,), call)


class Plan:
    """Functions of the ids alone; ``top_p`` and ``capacity`` mask rows."""

    params = (DEVICES, (1024,))
    param_names = ("device", "experts")
    rounds = 1
    repeat = (2, 8, 0.3)

    def setup(self, device, experts):
        self.ids = testing.make_experts(T, experts, K, routing="distinct", device=device)
        self.skewed = testing.make_experts(4096, experts, K, routing="skewed", device=device)
        self.weights = torch.rand(4096, K, generator=torch.Generator().manual_seed(0)).to(device)
        self.logits = testing.make_logits(T, experts, device=device)
        F.plan(self.ids, experts)

    def _wait(self, device):
        if device == "cuda":
            torch.cuda.synchronize()

    def time_plan(self, device, experts):
        F.plan(self.ids, experts)
        self._wait(device)

    def time_tokens_per_expert(self, device, experts):
        present("functional.tokens_per_expert")(self.ids, experts)
        self._wait(device)

    def time_top_p(self, device, experts):
        present("functional.route_top_p")(self.logits, 1 / 128)
        self._wait(device)

    def time_capacity(self, device, experts):
        present("functional.apply_capacity")(self.skewed, self.weights, experts, 1.25)
        self._wait(device)
