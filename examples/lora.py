"""Adapters on frozen experts: fine-tuned to a second task, merged for inference, and unmerged with equal bits."""

import torch
from torch import nn

from fusedonemoe import MoE, add_lora

HIDDEN = 32


def fit(model, target, steps):
    """Train the parameters that require gradients; return the first and the last loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(256, HIDDEN)
        loss = (model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main():
    torch.manual_seed(0)
    first = torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5
    second = first + 0.2 * torch.randn(HIDDEN, 4) @ torch.randn(4, HIDDEN) / 2  # of low rank, as adapters like it
    model = nn.Sequential(MoE(hidden_size=HIDDEN, intermediate_size=64, num_experts=8, top_k=2))
    print("first task:  loss {:.2f} to {:.2f}".format(*fit(model, first, 200)))

    add_lora(model, r=8, alpha=16)  # freezes everything else
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"adapters: {adapters} of {sum(p.numel() for p in model.parameters())} parameters are trained")
    print("second task: loss {:.2f} to {:.2f}".format(*fit(model, second, 200)))

    experts, x = model[0].experts, torch.randn(5, HIDDEN)
    before, adapted = experts.base.down_proj.clone(), model(x)
    experts.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    experts.unmerge()
    print("merged and taken back:", "the same bits" if torch.equal(experts.base.down_proj, before) else "other bits")


if __name__ == "__main__":
    main()
