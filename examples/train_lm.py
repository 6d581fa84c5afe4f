"""A byte-level language model with a mixture-of-experts layer, compiled, learns its own source code."""

from pathlib import Path

import torch
from torch import nn

from fusedonemoe import MoE
from fusedonemoe.balance import usage

WINDOW, BATCH, STEPS = 64, 16, 120


class Layer(nn.Module):
    """A running mean of the past, which keeps the example short where a real model has attention and more layers."""

    def __init__(self, hidden):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.mix = nn.Linear(3 * hidden, hidden)
        self.moe = MoE(hidden_size=hidden, intermediate_size=2 * hidden, num_experts=8, top_k=2)

    def forward(self, x):
        h = self.norms[0](x)
        before = nn.functional.pad(h, (0, 0, 1, 0))[:, :-1]
        mean = h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]
        x = x + self.mix(torch.cat([h, before, mean], dim=-1))
        out = self.moe(self.norms[1](x), return_routing=True)
        return x + out.output, out.tokens_per_expert


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out, and how many tokens each expert had."""

    def __init__(self, hidden=64):
        super().__init__()
        self.embed = nn.Embedding(256, hidden)
        self.layer = Layer(hidden)
        self.head = nn.Linear(hidden, 256, bias=False)

    def forward(self, ids):
        x, counts = self.layer(self.embed(ids))
        return self.head(x), counts


def main():
    torch.manual_seed(0)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    model = LanguageModel()
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS + 1):
        start = torch.randint(len(text) - WINDOW, (BATCH, 1))
        batch = text[start + torch.arange(WINDOW + 1)]
        logits, counts = compiled(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0:
            print(f"step {step:3d}: loss {loss.item():.1f} nats a byte")
    print(f"experts at work: {(counts > 0).sum()} of {len(counts)}, entropy {usage(counts=counts).entropy:.1f} of 1")


if __name__ == "__main__":
    main()
