"""Checks that a resumed run takes the same samples in each optimizer step as before, on any number of processes.

Samples, noise and dropout depend on the position in the stream of samples and not on the process. So a step is the
same, up to rounding, if it has the same samples: as one process with batch size 2, or as two with batch size 1.
"""

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.sections import TrainSection
from halfbyte.trainer.run_folder.saved_state import Position
from halfbyte.trainer.wording import in_prose


def check_batching(position: Position, train: TrainSection, processes: int) -> None:
    """Checks the number of samples per optimizer step.

    Raises:
        RecipeError: it differs from that of the checkpoint.
    """
    before = position.global_batch * position.accumulation
    now = train.batch_size * processes * train.grad_accumulation
    if before != now:
        raise RecipeError(
            f"--resume: the run takes {before} samples per optimizer step, but train.batch_size {train.batch_size} on"
            f" {processes} process{'' if processes == 1 else 'es'} with train.grad_accumulation"
            f" {train.grad_accumulation} takes {now}; {_advice(position, processes)}"
        )


def check_order(position: Position, train: TrainSection, processes: int, sizes: int) -> None:
    """Checks that the samples come in the same order as before.

    A micro-batch holds images of one size. Images of several sizes are therefore taken in an order that depends on the
    size of a micro-batch over all processes.

    sizes: the number of image sizes.

    Raises:
        RecipeError: the order would be another.
    """
    now = train.batch_size * processes
    if sizes > 1 and position.global_batch != now:
        raise RecipeError(
            f"--resume: the run takes {position.global_batch} samples per micro-batch over all processes, but now"
            f" {now}. Its images have {sizes} sizes, so they would come in another order;"
            f" {_advice(position, processes)}"
        )


def _advice(position: Position, processes: int) -> str:
    if position.global_batch % processes == 0:
        return (
            f"set train.batch_size={position.global_batch // processes}"
            f" train.grad_accumulation={position.accumulation}"
        )
    most = position.global_batch
    counts = [str(count) for count in range(1, most + 1) if most % count == 0]
    return (
        f"start {in_prose(counts)} processes, set train.grad_accumulation={position.accumulation}, and set"
        f" train.batch_size so that its product with the number of processes is {most}"
    )
