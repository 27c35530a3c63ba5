"""Tests that a run resumes with another number of processes or another batch size if its steps keep their samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder.batching import check_batching, check_order
from halfbyte.trainer.run_folder.folder import RunFolder, begin, claim
from halfbyte.trainer.run_folder.saved_state import Position, read_state
from halfbyte.trainer.training.metrics import read_metrics
from halfbyte.trainer.training.module import DiffusionModule

from runs import run_here, write_recipe
from small_checkpoint import save

QUICK = ("sample.prompts=[]", "output.export_base=false", "checkpoint.every=2", "data.caption_dropout=0.3")
BEFORE = ("train.batch_size=2", "train.grad_accumulation=2")  # 4 samples per step


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the samples that were trained on, in order."""
    positions: list[int] = []
    loss = DiffusionModule.loss

    def observed(self: DiffusionModule, batch: object) -> object:
        positions.extend(batch.positions)  # type: ignore[attr-defined]
        return loss(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionModule, "loss", observed)
    return positions


def losses(run: Path) -> list[float]:
    return [row.loss for row in read_metrics(run / "metrics.csv")]


def test_the_same_samples_come_in_the_same_order(tmp_path: Path, mini_flux: Path, seen: list[int]) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    whole = losses(run_here(recipe, *QUICK, *BEFORE, f"output.dir={tmp_path / 'whole'}"))
    assert seen == list(range(16))
    seen.clear()
    run_here(recipe, *QUICK, *BEFORE, "train.steps=2")
    run = run_here(recipe, *QUICK, "train.batch_size=4", "train.grad_accumulation=1", resume=True)
    assert seen == list(range(16))
    assert losses(run) == pytest.approx(whole, rel=1e-4)


def allowed(was: Position, processes: int, batch: int, accumulation: int, recipe: Path, sizes: int) -> bool:
    settings = [f"train.batch_size={batch}", f"train.grad_accumulation={accumulation}"]
    train = load_recipe(recipe, settings).train
    check_batching(was, train, processes)
    check_order(was, train, processes, sizes)
    return True


RIGHT: Sequence[tuple[int, int, int, int]] = (  # processes, batch size, accumulation, image sizes
    (1, 4, 3, 2),
    (2, 2, 3, 2),
    (4, 1, 3, 2),
    (1, 12, 1, 1),
    (3, 1, 4, 1),
)
WRONG: Sequence[tuple[int, int, int, int, str]] = (  # and the advice
    (2, 4, 3, 2, "set train.batch_size=2 train.grad_accumulation=3"),
    (1, 1, 3, 1, "set train.batch_size=4 train.grad_accumulation=3"),
    (1, 12, 1, 2, "set train.batch_size=4 train.grad_accumulation=3"),
    (3, 1, 4, 2, "start 1, 2 or 4 processes"),
    (5, 1, 3, 1, "start 1, 2 or 4 processes"),
)


def test_steps_must_keep_their_samples(tmp_path: Path, mini_flux: Path) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    was = Position(2, 6, 4)  # 4 samples per micro-batch, 3 micro-batches per step
    for processes, batch, accumulation, sizes in RIGHT:
        assert allowed(was, processes, batch, accumulation, recipe, sizes)
    for processes, batch, accumulation, sizes, advice in WRONG:
        with pytest.raises(RecipeError) as caught:
            allowed(was, processes, batch, accumulation, recipe, sizes)
        assert advice in str(caught.value)


BY_SIZE = Position(2, 6, {512: 8, 1024: 2})  # samples per micro-batch by resolution, 3 micro-batches per step


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation", "advice"),
    [
        (1, "{512: 8, 1024: 2}", 3, None),
        (2, "{512: 4, 1024: 1}", 3, None),
        (2, "{512: 4, 1024: 1}", 6, "set 'train.batch_size={512: 4, 1024: 1}' train.grad_accumulation=3"),
        (1, "{512: 4, 1024: 1}", 3, "set 'train.batch_size={512: 8, 1024: 2}' train.grad_accumulation=3"),
        (1, "5", 3, "set 'train.batch_size={512: 8, 1024: 2}' train.grad_accumulation=3"),
        (4, "{512: 2, 1024: 1}", 3, "start 1 or 2 processes"),
    ],
)
def test_micro_batches_of_several_sizes_must_stay_the_same(
    tmp_path: Path, mini_flux: Path, processes: int, batch: str, accumulation: int, advice: str | None
) -> None:
    settings = [f"train.batch_size={batch}", f"train.grad_accumulation={accumulation}"]
    train = load_recipe(write_recipe(tmp_path, mini_flux), ["data.resolution=[512, 1024]", *settings]).train
    if advice is None:
        check_batching(BY_SIZE, train, processes)
        check_order(BY_SIZE, train, processes, 2)
        return
    with pytest.raises(RecipeError) as caught:
        check_batching(BY_SIZE, train, processes)
    assert advice in str(caught.value)
    assert str(BY_SIZE.global_batch) in str(caught.value)


def test_a_checkpoint_keeps_the_samples_of_each_resolution(tmp_path: Path) -> None:
    assert read_state(save(tmp_path, 2, samples={512: 8, 1024: 2})).position.global_batch == {512: 8, 1024: 2}
    state = (tmp_path / "step-000002" / "state.json").read_text()
    # One number for all is written as before, so that checkpoints of both kinds can be read.
    save(tmp_path, 4, samples=8)
    other = (tmp_path / "step-000004" / "state.json").read_text()
    assert [json.loads(text)["position"]["global_batch"] for text in (state, other)] == [
        {"512": 8, "1024": 2},
        8,
    ]


def test_the_advice_of_the_message_is_accepted(
    tmp_path: Path, mini_flux: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_recipe(tmp_path, mini_flux)
    recipe = load_recipe(path)
    run = RunFolder(recipe.output.dir)
    begin(run, load_recipe(path, ["train.batch_size=4"]))
    save(run.checkpoints, 2, samples=4)
    with pytest.raises(RecipeError) as caught:
        claim(run, recipe, resume=True, processes=2)
    advice = str(caught.value).rpartition("set ")[2].split()
    assert advice == ["train.batch_size=2", "train.grad_accumulation=2"]
    claim(run, load_recipe(path, advice), resume=True, processes=2)
    assert "train.batch_size: 4 -> 2" in caplog.text
