"""Helpers that run `halfbyte sample` in tests."""

from pathlib import Path

import numpy
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app


def invoke(*arguments: object) -> Result:
    """Runs `halfbyte sample` with these arguments."""
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def drawn_pixels(output: Path, *arguments: object) -> dict[str, numpy.ndarray]:
    """Runs `halfbyte sample` and returns the images by file name, (H, W, 3) uint8. Fails if the command fails."""
    result = invoke(*arguments, "--output", output)
    assert result.exit_code == 0, result.output
    return {
        path.name: numpy.asarray(Image.open(path).convert("RGB"))
        for path in sorted(output.glob("prompt*.png"))
    }
