"""`halfbyte sample`: what it draws is what training drew, at any strength, and can be drawn again from its file."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from halfbyte.trainer.cli import app

from runs import run_here, write_recipe


def invoke(*arguments):
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def draw(output, *arguments):
    """The pictures by name, as bytes of their pixels."""
    result = invoke(*arguments, "--output", output)
    assert result.exit_code == 0, result.output
    return {
        path.name: Image.open(path).convert("RGB").tobytes() for path in sorted(output.glob("prompt*.png"))
    }


@pytest.fixture(scope="module", params=["flux", "sd3"])
def finished(request, tmp_path_factory):
    """The model and the run's folder, whose adapter does something that is seen."""
    model = request.getfixturevalue(f"mini_{request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(folder, model, family=request.param)
    run = run_here(recipe, "sample.prompts=[a gradient, a red one]", "optimizer.lr=0.02", "lora.alpha=12")
    return model, run


def pixels(run, step, place):
    return Image.open(run / "samples" / f"step-{step:06d}-{place:02d}.png").convert("RGB").tobytes()


def test_a_runs_pictures_are_drawn_again_to_the_bit(finished, tmp_path):
    _, run = finished
    drawn = draw(tmp_path / "out", run, "--strength", "0,1")
    trained = [pixels(run, 4, place) for place in (0, 1)]
    assert [drawn["prompt00-strength1-seed0.png"], drawn["prompt01-strength1-seed1.png"]] == trained
    base = [drawn["prompt00-strength0-seed0.png"], drawn["prompt01-strength0-seed1.png"]]
    assert trained[0] != base[0]
