"""The least work of a step of a whole decoder, counted from the model: operations, bytes, and parameters."""

from dataclasses import dataclass
from typing import Any

from fusedonemoe.bench.workloads import LeastWork

# Of every parameter of rank 3, one slice for each expert.
EXPERTS_RANK = 3


@dataclass(frozen=True)
class Account:
    """A model of transformers whose experts are stacks.

    Attributes:
        parameters: all of them.
        active_parameters: those that one token is multiplied with: no embeddings, and K of the E experts.
        matrices: those of them that stand in matrices.
        pair: operations of attention, in all layers, for a token and one that it attends to.
        key_bytes: keys and values of one token in the cache.
        itemsize: bytes of a parameter.
    """

    parameters: int
    active_parameters: int
    matrices: int
    pair: int
    key_bytes: int
    itemsize: int

    def forward_flops(self, tokens: int, pairs: int) -> int:
        """Count the operations of a forward pass.

        Args:
            tokens: in all sequences.
            pairs: of a token and one that it attends to.
        """
        return 2 * tokens * self.matrices + pairs * self.pair


def account_of(model: Any) -> Account:
    """Count a model.

    Args:
        model: of transformers, with a configuration and attention as Qwen3-MoE's.
    """
    config, embeddings = model.config, model.get_input_embeddings().weight
    everything = [p for p in model.parameters() if p is not embeddings]
    of_token = {
        id(p): p.numel() * config.num_experts_per_tok // p.shape[0] if p.dim() == EXPERTS_RANK else p.numel() for p in everything
    }
    heads, keys, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    return Account(
        parameters=sum(p.numel() for p in everything) + embeddings.numel(),
        active_parameters=sum(of_token.values()),
        matrices=sum(of_token[id(p)] for p in everything if p.dim() > 1),
        pair=2 * 2 * heads * config.head_dim * layers,
        key_bytes=2 * keys * config.head_dim * layers * embeddings.itemsize,
        itemsize=embeddings.itemsize,
    )


def causal_pairs(sequences: int, length: int) -> int:
    """Tokens and those before them, themselves included.

    Args:
        sequences: how many.
        length: of each.
    """
    return sequences * length * (length + 1) // 2


def training_work(account: Account, *, sequences: int, length: int) -> LeastWork:
    """A forward and a backward pass with gradients of all parameters: two products for each of the forward.

    Args:
        account: of the model.
        sequences: in the batch.
        length: of each.
    """
    flops = 3 * account.forward_flops(sequences * length, causal_pairs(sequences, length))
    # The weights of one token are read at least twice, and every gradient is written.
    return LeastWork(flops, (2 * account.active_parameters + account.parameters) * account.itemsize)


def adapter_work(account: Account, *, length: int, adapters: int) -> LeastWork:
    """A forward and a backward pass down to the embeddings, with gradients of adapters alone.

    Args:
        account: of the frozen model.
        length: of the one sequence.
        adapters: parameters of them that one token is multiplied with.
    """
    # A frozen matrix has one product in the backward; attention, whose both sides have gradients, and an adapter have two.
    flops = 4 * length * account.matrices + 3 * (causal_pairs(1, length) * account.pair + 2 * length * adapters)
    return LeastWork(flops, 2 * (account.active_parameters + adapters) * account.itemsize)


def decode_work(account: Account, *, context: int) -> LeastWork:
    """A forward pass of one token behind a cache.

    Args:
        account: of the model.
        context: tokens in the cache.
    """
    seen = context + 1
    return LeastWork(account.forward_flops(1, seen), account.active_parameters * account.itemsize + seen * account.key_bytes)
