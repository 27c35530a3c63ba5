"""Runs `train` on a large card with the memory of a small one.

    python -m scripts.bench.train_in_budget GIB RECIPE [settings by dotted name]

torch's allocator gives the process GIB minus a CUDA context, from encoding to export. A run that needs more
ends with exit code 6, as it would on that card. The limit does not apply to the processes that the run starts
one after the other, for the attention probe and the export's self-check. Prints the peaks of allocated and
reserved memory.
"""

import sys

from halfbyte.trainer.cli.app import train_app  # first: it readies torch's allocator
from halfbyte.trainer.plan.phases import CONTEXT_BYTES

import torch  # isort: skip


def main() -> None:
    """Reads the budget; passes the other arguments to `train`."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: scripts/bench/train_in_budget.py GIB RECIPE [settings]")
    budget = float(sys.argv.pop(1))
    allowed = budget * 2**30 - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        train_app()
    finally:
        allocated, reserved = (
            peak() / 2**30 for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        )
        print(
            f"within {budget:g} GiB: at most {allocated:.2f} GiB allocated and {reserved:.2f} reserved"
            f" of {allowed / 2**30:.2f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
