"""Metrics of a run: metrics.csv, validation.csv and TensorBoard, continuous across resumes.

A row is committed when the checkpoint of its step, or of a later step, is complete: it reaches the disk before that
checkpoint (`sync_rows`) and is never dropped again. A resumed run starts at the newest usable checkpoint, drops the
rows after it and writes them again, with the same values. So a run that is killed at any point, even while it starts,
ends with the rows of an uninterrupted one.
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from halfbyte.quant.files.atomic import flush, write_file
from halfbyte.trainer.training.csv_rows import (
    Row,
    Rows,
    is_near,
    keep_damaged,
    read_rows,
    whole_number,
)

log = logging.getLogger(__name__)

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
    skipped_steps: int | None = (
        None  # left out since the start of the run; None unless train.on_nonfinite is skip
    )


@dataclass(frozen=True)
class Measurement:
    """The loss on the held-out images after a step, see `validation`; a row of validation.csv."""

    step: int
    loss: float  # mean over images and noise levels
    by_sigma: Mapping[float, float]  # noise level -> mean over images


_COLUMNS = [field.name for field in fields(StepMetrics)]
_OPTIONAL = ("validation_loss", "skipped_steps")
# In the files of version 0.2 and older.
_FORMER_COLUMNS = [name for name in _COLUMNS if name != "skipped_steps"]


class MetricsWriter:
    """Appends rows of metrics.

    First drops the rows after the step that a run resumes at, because they will be written again. A run that starts
    at step 0 starts its files again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        kept = _kept(folder / METRICS, _metrics_rows(folder / METRICS), first_step)
        text = io.StringIO(newline="")
        start = csv.DictWriter(text, _COLUMNS)
        start.writeheader()
        start.writerows(asdict(row) for row in kept)
        # Atomically, and only then opened for more: a run killed here keeps its rows.
        write_file(folder / METRICS, text.getvalue())
        self._file = (folder / METRICS).open("a", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, _COLUMNS)
        self._measurements = _kept(folder / VALIDATION, _validation_rows(folder / VALIDATION), first_step)
        self._write_validation()
        flush(folder)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Appends a row to metrics.csv, and flushes it to the file."""
        row = asdict(metrics)
        self._rows.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if value is not None and name not in ("step", "validation_loss"):
                self._board.add_scalar(f"train/{name}", value, metrics.step)

    def write_validation(self, measured: Measurement) -> None:
        """Adds a row to validation.csv, and writes it to the file."""
        self._measurements.append(measured)
        self._write_validation()
        self._board.add_scalar("validation/loss", measured.loss, measured.step)
        for sigma, loss in measured.by_sigma.items():
            self._board.add_scalar(f"validation/sigma_{sigma:g}", loss, measured.step)

    def close(self) -> None:
        """Flushes the files to the disk and closes them."""
        self._file.close()
        self._board.close()
        sync_rows(self._folder)

    def _write_validation(self) -> None:
        """Writes the whole file: it is short, and its columns are only known with the first row."""
        path = self._folder / VALIDATION
        if not self._measurements:
            path.unlink(missing_ok=True)
            return
        # The newest row names the columns: one that was read may have a damaged name.
        columns = self._measurements[-1].by_sigma
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["step", "loss", *columns])
        rows.writerows(
            [row.step, row.loss, *row.by_sigma.values()]
            for row in self._measurements
            if len(row.by_sigma) == len(columns)
        )
        write_file(path, text.getvalue())


def sync_rows(folder: Path) -> None:
    """Flushes all rows written so far to the disk; called before a checkpoint commits them."""
    flush(folder / METRICS)
    flush(folder)  # validation.csv is flushed when it is written, but not its name


def read_metrics(path: Path) -> list[StepMetrics]:
    """Reads a metrics.csv; floats are bitwise identical to those written. Leaves out rows that cannot be read."""
    return _warned(path, _metrics_rows(path))


def read_validation(path: Path) -> list[Measurement]:
    """Reads a validation.csv; returns no rows if there is no file. Leaves out rows that cannot be read."""
    return _warned(path, _validation_rows(path))


def _warned(path: Path, found: Rows[Row]) -> list[Row]:
    if found.fault is not None:
        log.warning("%s: damaged or changed, %s; other rows are used", path, found.fault)
    return found.rows


def _kept(path: Path, found: Rows[Row], first_step: int) -> list[Row]:
    """Returns the rows that a run keeps which starts after `first_step` steps."""
    if first_step == 0:
        return []
    if found.fault is not None:
        keep_damaged(path, found.fault, len(found.rows))
    return [row for row in found.rows if row.step <= first_step]


def _metrics_rows(path: Path) -> Rows[StepMetrics]:
    return read_rows(path, _metrics_header, _step_metrics)


def _metrics_header(cells: Sequence[str]) -> tuple[Sequence[str], bool]:
    for columns in (_COLUMNS, _FORMER_COLUMNS):
        if is_near(",".join(cells), ",".join(columns)):
            return columns, list(cells) == columns
    missing = [name for name in _COLUMNS if name not in cells and name not in _OPTIONAL]
    if missing:
        raise ValueError(f"the header has no column {missing[0]}")
    return cells, False


def _step_metrics(cells: dict[str, str]) -> StepMetrics:
    numbers = {name: float(cells[name]) for name in _COLUMNS[1:] if name not in _OPTIONAL}
    validation, skipped = (cells.get(name, "") for name in _OPTIONAL)
    return StepMetrics(
        whole_number(cells["step"]),
        **numbers,
        validation_loss=float(validation) if validation else None,
        skipped_steps=whole_number(skipped) if skipped else None,
    )


def _validation_rows(path: Path) -> Rows[Measurement]:
    return read_rows(path, _validation_header, _measurement)


def _validation_header(cells: Sequence[str]) -> tuple[Sequence[str], bool]:
    names = []
    for cell in cells:
        fixed = [name for name in ("step", "loss") if name not in cells and is_near(cell, name)]
        names.append(fixed[0] if fixed else cell)
    for name in ("step", "loss"):
        if name not in names:
            raise ValueError(f"the header has no column {name}")
    for name in names:
        if name not in ("step", "loss"):
            float(name.replace(",", "."))
    if len(set(names)) < len(names):
        raise ValueError("the header has a column twice")
    return names, list(cells[:2]) == ["step", "loss"]


def _measurement(cells: dict[str, str]) -> Measurement:
    sigmas = {float(n.replace(",", ".")): float(v) for n, v in cells.items() if n not in ("step", "loss")}
    return Measurement(whole_number(cells["step"]), float(cells["loss"]), sigmas)
