"""Expert parallelism of transformers' models through this library's exchange, which compiles into one graph."""

from importlib.util import find_spec
from typing import Any

NAME = "fusedonemoe"


def register_expert_parallel() -> str:
    """Make the exchange an expert-parallel implementation of transformers.

    Then ``DistributedConfig(ep_size=..., ep_implementation="fusedonemoe")`` sends each token once to every rank whose experts
    it picked, under ``torch.compile(fullgraph=True)`` too, where transformers' own exchange breaks the graph. It runs whatever
    experts implementation the model has. Calling it again changes nothing.

    Returns:
        The name, ``"fusedonemoe"``.

    Raises:
        ImportError: transformers is missing, or too old to have expert-parallel implementations.

    Source:
        transformers, ``distributed/expert_parallel.py``: ``EPImplementation``.
    """
    if find_spec("transformers") is None:
        raise ImportError("transformers is missing: pip install 'fusedonemoe[hf]'")
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError as error:
        raise ImportError("this transformers has no expert-parallel implementations; 5.23 has") from error
    if NAME not in EPImplementationInterface():
        EPImplementationInterface.register(NAME, _implementation())
    return NAME


def _implementation() -> type[Any]:
    """The class, which inherits from transformers'."""
    import torch
    from torch import Tensor
    from transformers.distributed.expert_parallel import EPImplementation

    from fusedonemoe.agreement import agree
    from fusedonemoe.integrations.distributed.collectives import sum_of_parts, with_summed_gradient
    from fusedonemoe.integrations.distributed.description import describe_tensors, library_versions
    from fusedonemoe.integrations.distributed.dispatch import AllToAll

    def _settings_of(experts: Any, tp_mesh: Any) -> dict[str, object]:
        config = getattr(experts, "config", None)
        fields = ("model_type", "hidden_size", "num_experts_per_tok", "hidden_act", "swiglu_limit")
        return {
            "experts": type(experts).__name__,
            "num_experts of each process": experts.num_experts,
            "act_fn": type(getattr(experts, "act_fn", None)).__name__,
            "size of the tensor-parallel group": tp_mesh.size(),
            **{f"config.{name}": getattr(config, name, None) for name in fields},
            **describe_tensors(experts),
            **library_versions(),
        }

    class FusedOneMoEExpertParallel(EPImplementation):
        """One instance for each experts module."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            agree("ep_implementation='fusedonemoe'", lambda: _settings_of(experts, tp_mesh), ep_mesh.get_group())
            # A row that is nobody's: some experts implementations cannot run without any.
            self.dispatcher = AllToAll(ep_mesh.get_group(), self.num_local_experts * ep_mesh.size(), spare=1)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            shared = self.tp_mesh.size() > 1
            if shared:
                # The ranks of a tensor-parallel group hold the same tokens: each sends its part of them, the others as
                # tokens that go nowhere. The parts of the output and of the gradients then sum up to the whole.
                group = self.tp_mesh.get_group()
                hidden_states, top_k_weights = (with_summed_gradient(t, group) for t in (hidden_states, top_k_weights))
                T, size = hidden_states.shape[0], self.tp_mesh.size()
                mine = torch.arange(T, device=hidden_states.device) * size // max(T, 1) == self.tp_mesh.get_local_rank()
                top_k_index = torch.where(mine[:, None], top_k_index, -1)
            dispatched = self.dispatcher.dispatch(hidden_states, top_k_index, top_k_weights)
            ids = dispatched.experts.to(top_k_index.dtype)
            y = dispatched.combine(self.experts_forward(dispatched.x, ids, dispatched.weights))
            return sum_of_parts(y, group) if shared else y

    return FusedOneMoEExpertParallel
