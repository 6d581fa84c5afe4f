"""The sizes of a run: one for people, one for tests."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sizes of a demo run.

    Attributes:
        hidden_size: ``D`` of both models.
        num_layers: ``L``, transformer blocks.
        num_heads: attention heads.
        num_experts: ``E`` of each MoE block.
        top_k: ``K``.
        intermediate_size: ``F`` of one expert; the dense baseline's is ``K * F``.
        window: ``S``, bytes that a model sees at once.
        batch: ``B``, windows per step.
        steps: optimizer steps.
        learning_rate: peak of the schedule.
        balance_weight: factor on the load-balancing loss.
        validations: how often both models are validated, evenly spread, the last time after the last step.
        validation_batches: batches in one validation.
        sample_bytes: length of the generated text.
        throughput_experts: the larger ``E`` of the throughput comparison.
        throughput_rounds: timed calls per peer, of which the median counts.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 32
    top_k: int = 2
    intermediate_size: int = 64
    window: int = 256
    batch: int = 8
    steps: int = 400
    learning_rate: float = 3e-3
    balance_weight: float = 0.01
    validations: int = 8
    validation_batches: int = 16
    sample_bytes: int = 320
    throughput_experts: int = 128
    throughput_rounds: int = 5

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
    top_k=2,
    intermediate_size=32,
    window=64,
    batch=8,
    steps=30,
    validations=3,
    validation_batches=2,
    sample_bytes=80,
    throughput_experts=16,
    throughput_rounds=3,
)
