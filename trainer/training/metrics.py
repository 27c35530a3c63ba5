"""The run's numbers: metrics.csv, validation.csv and TensorBoard, whole across resumes."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from halfbyte.quant.files.atomic import write_file

METRICS = "metrics.csv"
VALIDATION = "validation.csv"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    loss: float  # mean over the step's micro-batches and processes
    lr: float
    grad_norm: float  # before clipping
    samples_per_second: float
    memory_gib: float  # peak allocated on the device so far, reserved with CUDA graphs; 0 on the CPU
    validation_loss: float | None = None  # None where it was not measured


@dataclass(frozen=True)
class Measurement:
    """The loss on the held-out pictures after a step, see `validation`."""

    step: int
    loss: float  # mean over pictures and noise levels
    by_sigma: Mapping[float, float]  # noise level -> mean over pictures


class MetricsWriter:
    """Appends rows; rows after the step a run resumes at are dropped first, for they will be made again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        names = [field.name for field in fields(StepMetrics)]
        kept = [row for row in read_metrics(folder / METRICS) if row.step <= first_step]
        self._file = (folder / METRICS).open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, names)
        self._rows.writeheader()
        self._rows.writerows(asdict(row) for row in kept)
        self._measurements = [row for row in read_validation(folder / VALIDATION) if row.step <= first_step]
        self._write_validation()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Adds a row; it is in the file when this returns."""
        row = asdict(metrics)
        self._rows.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "validation_loss"):
                self._board.add_scalar(f"train/{name}", value, metrics.step)

    def write_validation(self, measured: Measurement) -> None:
        """Adds a row to validation.csv; it is in the file when this returns."""
        self._measurements.append(measured)
        self._write_validation()
        self._board.add_scalar("validation/loss", measured.loss, measured.step)
        for sigma, loss in measured.by_sigma.items():
            self._board.add_scalar(f"validation/sigma_{sigma:g}", loss, measured.step)

    def close(self) -> None:
        """Flushes and closes all."""
        self._file.close()
        self._board.close()

    def _write_validation(self) -> None:
        """The whole file, for it is short: its columns are known with its first row alone."""
        path = self._folder / VALIDATION
        if not self._measurements:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["step", "loss", *self._measurements[0].by_sigma])
        rows.writerows([row.step, row.loss, *row.by_sigma.values()] for row in self._measurements)
        write_file(path, text.getvalue())


def read_metrics(path: Path) -> list[StepMetrics]:
    """The rows of a metrics.csv; floats come back to the bit. A row cut short by a crash is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    return [
        StepMetrics(
            int(row.pop("step")), **{name: float(value) for name, value in row.items() if value != ""}
        )
        for row in rows
    ]


def read_validation(path: Path) -> list[Measurement]:
    """The rows of a validation.csv, which is never cut short; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [
        Measurement(
            int(row.pop("step")), float(row.pop("loss")), {float(s): float(v) for s, v in row.items()}
        )
        for row in rows
    ]
