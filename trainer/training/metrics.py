"""Metrics of a run: metrics.csv, validation.csv and TensorBoard, continuous across resumes."""

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
    """The metrics of one optimizer step; a row of metrics.csv."""

    step: int
    loss: float  # mean over the step's micro-batches and processes
    lr: float
    grad_norm: float  # before clipping
    samples_per_second: float
    memory_gib: float  # peak of allocated device memory so far (reserved with CUDA graphs); 0 on the CPU
    validation_loss: float | None = None  # None if it was not measured after this step


@dataclass(frozen=True)
class Measurement:
    """The loss on the held-out images after a step, see `validation`; a row of validation.csv."""

    step: int
    loss: float  # mean over images and noise levels
    by_sigma: Mapping[float, float]  # noise level -> mean over images


class MetricsWriter:
    """Appends rows of metrics.

    First drops the rows after the step that a run resumes at, because they will be written again.
    """

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
        """Appends a row to metrics.csv, and flushes it to the file."""
        row = asdict(metrics)
        self._rows.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "validation_loss"):
                self._board.add_scalar(f"train/{name}", value, metrics.step)

    def write_validation(self, measured: Measurement) -> None:
        """Adds a row to validation.csv, and writes it to the file."""
        self._measurements.append(measured)
        self._write_validation()
        self._board.add_scalar("validation/loss", measured.loss, measured.step)
        for sigma, loss in measured.by_sigma.items():
            self._board.add_scalar(f"validation/sigma_{sigma:g}", loss, measured.step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._board.close()

    def _write_validation(self) -> None:
        """Writes the whole file: it is short, and its columns are only known with the first row."""
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
    """Reads a metrics.csv; floats are bitwise identical to those written. Skips a row that a crash cut short."""
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
    """Reads a validation.csv, which is written atomically; returns no rows if there is no file."""
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
