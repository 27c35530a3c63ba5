"""The run's numbers: metrics.csv and TensorBoard, one row a logged step, whole across resumes."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    loss: float  # mean over the step's micro-batches and processes
    lr: float
    grad_norm: float  # before clipping
    samples_per_second: float
    memory_gib: float  # peak allocated on the device so far; 0 on the CPU


class MetricsWriter:
    """Appends rows; rows after the step a run resumes at are dropped first, for they will be made again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        names = [field.name for field in fields(StepMetrics)]
        kept = [row for row in read_metrics(self.path) if row.step <= first_step]
        self._file = self.path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, names)
        self._rows.writeheader()
        self._rows.writerows(asdict(row) for row in kept)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Adds a row; it is in the file when this returns."""
        row = asdict(metrics)
        self._rows.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, metrics.step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """The rows of a metrics.csv; floats come back to the bit. A row cut short by a crash is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    return [
        StepMetrics(int(row.pop("step")), **{name: float(value) for name, value in row.items()})
        for row in rows
    ]
