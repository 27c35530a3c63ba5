"""Leaves out steps whose loss or gradient is NaN or infinite, in every process alike."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.trainer.errors import NonFiniteError
from halfbyte.trainer.runtime.world import World, max_over_processes

log = logging.getLogger(__name__)

STOPPED = (
    "the run stops and keeps its earlier checkpoints. Try a lower optimizer.lr, train.max_grad_norm: 1.0, or"
    " compute_dtype: bfloat16 instead of float16"
)


class SkippedSteps:
    """Decides which steps are left out, and counts them. A checkpoint saves the counts."""

    def __init__(self, world: World, most: int) -> None:
        """most: the number of steps in a row that may be left out."""
        self.world = world
        self.most = most
        self.now = False  # True if the last step was left out
        self.in_a_row = 0
        self.total = 0

    @property
    def counts(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def restore(self, counts: dict[str, int]) -> None:
        """Continues with the counts of a checkpoint; an empty dictionary stands for none left out."""
        self.in_a_row, self.total = counts.get("in_a_row", 0), counts.get("total", 0)

    def is_skipped(self, step: int, losses: Sequence[Tensor], grad_norm: Tensor, *, scaled: bool) -> bool:
        """Decides after the backward of optimizer step `step`; every process must make this call.

        losses: of this process's micro-batches. scaled: True in float16, whose gradient scaler itself treats a
        gradient that overflows.

        Raises:
            NonFiniteError: too many steps in a row would be left out.
        """
        loss, norm = torch.stack([torch.stack(list(losses)).float().mean(), grad_norm.float()]).tolist()
        is_wrong = not math.isfinite(loss) or not (scaled or math.isfinite(norm))
        self.now = max_over_processes(self.world, int(is_wrong)) > 0
        if not self.now:
            self.in_a_row = 0
            return False
        what = f"step {step}: the loss is {loss} and the gradient norm {norm}"
        if not is_wrong:
            what += ", but those of another process are not finite"
        if self.in_a_row == self.most:
            raise NonFiniteError(f"{what}, after {self.most} steps in a row that were left out; {STOPPED}")
        self.in_a_row += 1
        self.total += 1
        log.warning("%s; the step is left out (%d in a row, %d in this run)", what, self.in_a_row, self.total)
        return True
