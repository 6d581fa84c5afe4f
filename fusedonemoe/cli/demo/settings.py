"""The sizes of a run: one for people, one for tests."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sizes of a demo run."""

    hidden_size: int = 128  # ``D`` of both models
    num_layers: int = 4  # ``L``, transformer blocks
    num_heads: int = 4  # attention heads
    num_experts: int = 32  # ``E`` of each MoE block
    top_k: int = 2  # ``K``
    intermediate_size: int = 64  # ``F`` of one expert; the dense baseline's is ``K * F``
    window: int = 256  # ``S``, bytes that a model sees at once
    batch: int = 8  # ``B``, windows per step
    steps: int = 400  # optimizer steps
    learning_rate: float = 3e-3  # peak of the schedule
    balance_weight: float = 0.01  # factor on the load-balancing loss
    validations: int = 8  # how often both models are validated, evenly spread, the last time after the last step
    validation_batches: int = 16  # batches in one validation
    sample_bytes: int = 320  # length of the generated text
    throughput_experts: int = 128  # the larger ``E`` of the throughput comparison
    throughput_rounds: int = 5  # timed calls per peer, of which the median counts

    @property
    def tokens_per_step(self) -> int:
        """Bytes that one step trains on."""
        return self.batch * self.window


FULL = Settings()
QUICK = Settings(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_experts=8,
    intermediate_size=32,
    window=64,
    steps=30,
    validations=3,
    validation_batches=2,
    sample_bytes=80,
    throughput_experts=16,
    throughput_rounds=3,
)
