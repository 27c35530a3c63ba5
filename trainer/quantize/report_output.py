"""Prints the quantization report as tables and writes it as JSON."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.quantize.report import SCHEME_NAMES, LayerReport, QuantReport, Suggestion, quant_report
from halfbyte.trainer.runtime.progress import LazyProgress
from halfbyte.trainer.runtime.sizes import memory_size

_UNQUANTIZED = "bf16"
# Size column -> its scheme. The 4-bit schemes have equal sizes and differ only in their errors.
_SIZES = {"bf16": _UNQUANTIZED, "4 bits": "nf4", "int8": "int8"}
_PIPED_WIDTH = 160  # columns of a table that goes to a file or a pipe; rich would wrap it at 80


def run_quant_report(
    model: Path,
    component: str,
    *,
    beyond: tuple[str, float] | None,
    sample: int,
    worst: int,
    json_file: Path | None,
    progress_console: Console,
) -> None:
    """Measures a model, prints the report and writes it to `json_file`.

    Raises:
        RecipeError: The folder, the scheme or the JSON file is not usable.
    """
    if beyond is not None and beyond[0] not in SCHEME_NAMES:
        raise RecipeError(f"--scheme: got {beyond[0]!r}, accepted: {', '.join(SCHEME_NAMES)}")
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise RecipeError(f"--json: cannot write {json_file}; expected a file in an existing folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress = LazyProgress(progress_console, "measuring", "layer")
    try:
        report = quant_report(
            model, component, device=device, sample=sample, beyond=beyond, progress=progress
        )
    finally:
        progress.close()
    show(report, Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH), worst)
    if json_file is not None:
        write_file(json_file, to_json(report))


def to_json(report: QuantReport) -> str:
    """Converts the report to a JSON object.

    Errors are relative RMS errors, or null if a scheme cannot represent a weight. Sizes are in bytes.
    """

    def fields(layer: LayerReport) -> dict[str, Any]:
        return {
            "name": layer.name,
            "layers": layer.layers,
            "parameters": layer.parameters,
            "error": dict(zip(SCHEME_NAMES, layer.error.relative(), strict=True)),
            "bytes": {_UNQUANTIZED: 2 * layer.parameters}
            | dict(zip(SCHEME_NAMES, layer.nbytes, strict=True)),
        }

    content: dict[str, Any] = {
        "folder": str(report.folder),
        "model_class": report.model_class,
        "sample": report.sample,
        "total": fields(report.total),
        "kinds": [fields(kind) for kind in report.kinds],
        "layers": [fields(layer) for layer in report.layers],
    }
    if report.suggestion is not None:
        suggestion = report.suggestion
        content["suggestion"] = {
            "scheme": suggestion.scheme,
            "threshold": suggestion.threshold,
            "skip": list(suggestion.skip.entries),
            "layers": list(suggestion.skip.layers),
            "out_of_reach": suggestion.skip.out_of_reach,
            "parameters": suggestion.parameters,
            "bytes": suggestion.nbytes,
        }
    return json.dumps(content, indent=1) + "\n"


def show(report: QuantReport, console: Console, worst: int) -> None:
    """Prints totals by kind, the `worst` layers, and the suggested skip list."""
    total = report.total
    console.print(
        _table(f"{report.model_class}: {total.layers} linear layers", (*report.kinds, total), counted=True)
    )
    layers = report.layers[:worst]
    if layers:
        console.print(
            _table(f"the {len(layers)} layers with the largest error in nf4", layers, counted=False)
        )
    measured = "all weights" if report.sample == 0 else f"about {report.sample:,} weights per layer"
    console.print(
        f"relative RMS error of the weights in % ({measured}), and size on the device", highlight=False
    )
    if report.suggestion is not None:
        _show_suggestion(report.suggestion, console)


def _table(title: str, rows: Sequence[LayerReport], *, counted: bool) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    numbers = [*(["layers"] if counted else []), "weights", *(f"{name} %" for name in SCHEME_NAMES), *_SIZES]
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    for row in rows:
        errors = ["n/a" if error is None else f"{100 * error:.2f}" for error in row.error.relative()]
        nbytes = dict(zip(SCHEME_NAMES, row.nbytes, strict=True)) | {_UNQUANTIZED: 2 * row.parameters}
        sizes = [memory_size(nbytes[name]) for name in _SIZES.values()]
        table.add_row(
            row.name, *([str(row.layers)] if counted else []), _count(row.parameters), *errors, *sizes
        )
    return table


def _show_suggestion(suggestion: Suggestion, console: Console) -> None:
    limit = f"{100 * suggestion.threshold:g} % in {suggestion.scheme}"
    skip = suggestion.skip
    if not skip.layers and not skip.out_of_reach:
        lines = [f"no layer has an error above {limit}: quant.skip: []"]
    else:
        lines = [
            f"layers with an error above {limit}: {len(skip.layers)} can be skipped. With them in bf16"
            f" ({_count(suggestion.parameters)} weights), the linear weights use {memory_size(suggestion.nbytes)}",
            f"  quant.skip: [{', '.join(skip.entries)}]",
        ]
    for path, surplus in skip.out_of_reach.items():
        lines.append(
            f"  not listed: {path}, because the entry {path!r} would also skip {surplus} other layers"
        )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _count(number: int) -> str:
    return f"{number / 10**6:.1f} M" if number >= 10**6 else f"{number:,}"
