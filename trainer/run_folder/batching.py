"""Checks that a resumed run takes the same samples in each optimizer step as before, on any number of processes.

Samples, noise and dropout depend on the position in the stream of samples and not on the process. So a step is the
same, up to rounding, if it has the same samples: as one process with batch size 2, or as two with batch size 1.
"""

import shlex
from math import gcd

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.batch_sizes import BatchSize, over_processes
from halfbyte.trainer.recipe.sections import TrainSection
from halfbyte.trainer.run_folder.saved_state import Position
from halfbyte.trainer.wording import in_prose


def check_batching(position: Position, train: TrainSection, processes: int) -> None:
    """Checks the number of samples per optimizer step.

    With one batch size for all images, a step may be divided into other micro-batches. If it differs between
    resolutions, the order of the samples depends on it, so micro-batches must stay the same.

    Raises:
        RecipeError: it differs from that of the checkpoint.
    """
    before, now = position.global_batch, over_processes(train.batch_size, processes)
    if isinstance(before, int) and isinstance(now, int):
        same = before * position.accumulation == now * train.grad_accumulation
        taken, would = f"{before * position.accumulation}", f"{now * train.grad_accumulation}"
    else:
        same = before == now and position.accumulation == train.grad_accumulation
        taken, would = (
            f"{batch} x {accumulation}"
            for batch, accumulation in ((before, position.accumulation), (now, train.grad_accumulation))
        )
    if not same:
        raise RecipeError(
            f"--resume: the run takes {taken} samples per optimizer step, but train.batch_size {train.batch_size} on"
            f" {processes} process{'' if processes == 1 else 'es'} with train.grad_accumulation"
            f" {train.grad_accumulation} takes {would}; {_advice(position, processes)}"
        )


def check_order(position: Position, train: TrainSection, processes: int, kinds: int) -> None:
    """Checks that the samples come in the same order as before.

    A micro-batch holds images of one size. Images of several sizes are therefore taken in an order that depends on the
    size of a micro-batch over all processes.

    kinds: the number of image sizes; images with references of several sizes count as several.

    Raises:
        RecipeError: the order would be another.
    """
    now = over_processes(train.batch_size, processes)
    if kinds > 1 and position.global_batch != now:
        raise RecipeError(
            f"--resume: the run takes {position.global_batch} samples per micro-batch over all processes, but now"
            f" {now}. Its images have {kinds} sizes, so they would come in another order;"
            f" {_advice(position, processes)}"
        )


def _advice(position: Position, processes: int) -> str:
    batch = position.global_batch
    most = batch if isinstance(batch, int) else gcd(*batch.values())
    if most % processes == 0:
        return f"set {_setting(batch, processes)} train.grad_accumulation={position.accumulation}"
    counts = [str(count) for count in range(1, most + 1) if most % count == 0]
    return (
        f"start {in_prose(counts)} processes, set train.grad_accumulation={position.accumulation}, and set"
        f" train.batch_size so that its product with the number of processes is {batch}"
    )


def _setting(batch: BatchSize, processes: int) -> str:
    """Returns the setting for one of the processes, as the command line takes it."""
    if isinstance(batch, int):
        return f"train.batch_size={batch // processes}"
    own = {resolution: samples // processes for resolution, samples in batch.items()}
    return shlex.quote(f"train.batch_size={own}")
