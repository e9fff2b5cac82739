"""What a quickstart may change: standard library only, as the command checks it first."""

import math
from dataclasses import dataclass

from ...errors import UserError
from ..data.tiny import EXPERTS, KEY_VALUE_HEADS, LAYERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Seed and size of a run; the README's figures come from the defaults."""

    seed: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    seq_length: int = 32
    max_questions: int | None = None
    """How many of the held-out scans are used for evaluation; None is all of them."""

    @property
    def ranks(self) -> int:
        """Processes that the sizes need: expert parallelism spans tensor and data parallelism."""
        return self.pipeline_parallel * math.lcm(self.tensor_parallel, self.expert_parallel)

    @property
    def micro_batch_size(self) -> int:
        """Rows that a rank computes at once: a batch has one microbatch per pipeline stage."""
        return max(1, self.batch_size * self.tensor_parallel // self.ranks)

    def check_layout(self) -> None:
        """Refuse what `GPTOSSVisionProvider.finalize` would refuse for this model, without importing Megatron.

        Raises:
            UserError: naming the sizes that don't divide.
        """
        for size, name, count, what in (
            (self.tensor_parallel, "tensor_model_parallel_size", KEY_VALUE_HEADS, "key/value groups"),
            (self.expert_parallel, "expert_model_parallel_size", EXPERTS, "experts"),
        ):
            if count % size:
                raise UserError(f"{name}={size} does not divide the {count} {what} of this model.")
        if LAYERS % self.pipeline_parallel:
            raise UserError(
                f"{self.pipeline_parallel} pipeline stages do not divide the {LAYERS} layers of this model."
            )
