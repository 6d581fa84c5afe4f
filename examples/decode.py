"""Decoding on a CPU: one token at a time, with the expert weights packed in the reading order of the kernels."""

import torch
from torch import nn

from fusedonemoe import MoE, explain

VOCABULARY, HIDDEN = 96, 64


class Recurrent(nn.Module):
    """A language model whose state is one vector, so that a step needs no cache of keys and values."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.cell = nn.GRUCell(HIDDEN, HIDDEN)
        self.moe = MoE(hidden_size=HIDDEN, intermediate_size=128, num_experts=32, top_k=4)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, token, state):
        state = self.cell(self.embed(token), state)
        return self.head(state + self.moe(state)), state


@torch.inference_mode()
def generate(model, length=24):
    """Generate the most likely next tokens, from token 0."""
    token, state, text = torch.zeros(1, dtype=torch.long), torch.zeros(1, HIDDEN), []
    for _ in range(length):
        logits, state = model(token, state)
        token = logits.argmax(-1)
        text.append(token.item())
    return text


def main():
    torch.manual_seed(0)
    model = Recurrent().eval()
    plain = generate(model)
    experts = model.moe.experts
    print("implementation:", explain(model.moe, tokens=1).impl)
    weights = sum(p.nbytes for p in experts.parameters()) / 1e6
    model.moe.prepack()
    print(f"weights {weights:.1f} MB, packed in their place {experts.packed_bytes / 1e6:.1f} MB")
    print("text with packed weights:", "the same" if generate(model) == plain else "another")

    with torch.no_grad():
        experts.down_proj.mul_(100)  # the panels are the weights, so what writes into the parameter changes them
    packed = generate(model)
    model.moe.unpack()
    print("after a change:", "the new weights'" if packed == generate(model) != plain else "another")


if __name__ == "__main__":
    main()
