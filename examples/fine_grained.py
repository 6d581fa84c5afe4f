"""A hundred thousand experts of one neuron each, found by product keys; a step touches only the rows of chosen experts."""

import torch

from fusedonemoe import FineGrainedMoE

HIDDEN, SIDE, TOP_K = 32, 320, 32


def main():
    torch.manual_seed(0)
    layer = FineGrainedMoE(HIDDEN, num_experts=SIDE * SIDE, top_k=TOP_K, sparse=True)
    tables = [layer.down_embed, layer.up_embed]
    rest = [parameter for parameter in layer.parameters() if all(parameter is not table for table in tables)]
    # Sparse gradients for the two tables, so the cost of a step depends on the used rows only.
    optimizers = [torch.optim.SparseAdam(tables, lr=3e-2), torch.optim.Adam(rest, lr=1e-2)]
    teacher = torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5

    print(f"{SIDE * SIDE} experts, {SIDE + SIDE} keys are scored for a token, {TOP_K} experts run")
    for step in range(301):
        x = torch.randn(128, HIDDEN)
        loss = (layer(x).output - torch.tanh(x @ teacher)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        touched = layer.down_embed.grad.coalesce().indices().shape[1]
        assert touched <= 128 * TOP_K  # of all the rows of a table; the others are neither read nor written
        if step % 100 == 0:
            print(f"step {step:3d}: loss {loss.item():.1f}")


if __name__ == "__main__":
    main()
