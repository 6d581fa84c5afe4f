"""A model with a mixture-of-experts loop of its own, changed by three lines: the same numbers, in one static graph."""

import torch
from torch import nn

from fusedonemoe import functional as F  # 1: the import


class Loop(nn.Module):
    """A common way to write the block: a loop over experts, each with its tokens."""

    def __init__(self, hidden=64, intermediate=128, experts=8, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, intermediate) / intermediate**0.5)

    def forward(self, x):
        weights, experts = self.gate(x).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(len(self.gate_up)):
            token, choice = (experts == e).nonzero(as_tuple=True)
            gate, up = (x[token] @ self.gate_up[e].T).chunk(2, dim=-1)
            rows = (nn.functional.silu(gate) * up) @ self.down[e].T
            y = y.index_add(0, token, rows * weights[token, choice, None])
        return y


class Fused(Loop):
    """The block with the same parameters and the same result."""

    def forward(self, x):
        weights, experts = F.route(self.gate(x), self.top_k)  # 2: instead of softmax, topk and the division
        return F.experts_mlp(x, experts, weights, self.gate_up, self.down)  # 3: instead of the loop


def run(block, x):
    """Return the output, and the gradients of its squared mean."""
    y = block(x)
    return y, *torch.autograd.grad(y.square().mean(), list(block.parameters()))


def main():
    torch.manual_seed(0)
    loop, fused = Loop(), Fused()
    fused.load_state_dict(loop.state_dict())
    graphs = []

    def keep(graph, inputs):  # a backend that runs what it is given; leave it out, and torch makes code of the graph
        graphs.append(graph)
        return graph

    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=keep)
    for tokens in (48, 33, 200):
        x = torch.randn(tokens, 64)
        for actual, expected in zip(run(compiled, x), run(loop, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        print(f"{tokens:3d} tokens: output and gradients of all {len(list(fused.parameters()))} parameters agree")
    print(f"graphs: {len(graphs)}")


if __name__ == "__main__":
    main()
