"""Tests that a process killed at any point loses nothing that was complete, and that the next one clears up."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from halfbyte.quant.files.atomic import put_in_place, recover, work_folder, write_file
from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.denoiser.load import load_run_base
from halfbyte.trainer.denoiser.settings import base_recipe
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.export import ExportSettings, export_saved
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.quantize.run import quantize
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.run_folder.checkpoint_folders import recover_checkpoints
from halfbyte.trainer.run_folder.folder import RunFolder, begin, claim, written_recipe
from halfbyte.trainer.run_folder.pinned_base import open_base
from halfbyte.trainer.runtime.staging import keep_others
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.metrics import (
    Measurement,
    MetricsWriter,
    StepMetrics,
    read_metrics,
    read_validation,
)

from kill_points import kill, leftovers, points, sample, tree
from runs import results, run_here, write_recipe
from small_checkpoint import save
from soak import parts, report, share

SHORT = 4  # points of each action in the short form, besides those after these operations
RENAMES = ("rename", "exchange")
CRITICAL = (*RENAMES, "replace", "open")
BOTH_WAYS = pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])


def test_the_points_are_those_of_the_action(tmp_path: Path) -> None:
    found = points(lambda: write_file(tmp_path / "a", "new"))
    operations = [f"{when} {what}" for what in ("open", "fsync", "replace") for when in ("before", "after")]
    assert [" ".join(point.split()[:2]) for point in found] == [*operations, "before unlink"]
    (tmp_path / "a").write_text("old")
    for point in range(len(found)):
        kill(lambda: write_file(tmp_path / "a", "new"), point)
        assert (tmp_path / "a").read_text() == ("old" if point < 5 else "new")
        assert bool(leftovers(tmp_path)) == (1 <= point < 5)
        (tmp_path / "a").write_text("old")
        for left in leftovers(tmp_path):
            (tmp_path / left).unlink()
    with pytest.raises(AssertionError, match="not killed"):
        kill(lambda: write_file(tmp_path / "a", "new"), len(found))


def put(folder: Path, content: str) -> None:
    """Replaces a folder as an export does."""
    with work_folder(folder) as work:
        (work / "ours").write_text(content)
        keep_others(folder, work, lambda path: path == "ours")
        put_in_place(work, folder)


@BOTH_WAYS
def test_a_folder_is_old_or_new_and_keeps_a_users_files(tmp_path: Path, exchange: bool) -> None:
    place = tmp_path / "run" / "adapter"

    def prepare() -> dict[str, bytes]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        put(place, "old")
        (place / "notes" / "empty").mkdir(parents=True)
        (place / "notes" / "mine.txt").write_text("mine")
        (place / "link").symlink_to("notes")
        os.mkfifo(place / "pipe")
        return tree(place)

    before = prepare()
    after = before | {"ours": b"new"}
    found = points(lambda: put(place, "new"), exchange=exchange)
    for point in sample(found, SHORT, after=CRITICAL):
        what = found[point]
        assert prepare() == before
        kill(lambda: put(place, "new"), point, exchange=exchange)
        if exchange:
            assert tree(place) in (before, after), what
        recover(place)
        assert tree(place) in (before, after), what
        assert (place / "pipe").is_fifo()
        assert leftovers(tmp_path) == [], what
        put(place, "newer")
        assert tree(place) == before | {"ours": b"newer"}


@BOTH_WAYS
def test_no_checkpoint_is_lost(tmp_path: Path, exchange: bool) -> None:
    root = tmp_path / "checkpoints"

    def step() -> None:
        recover_checkpoints(root)
        save(root, 4)
        save(root, 6)
        checkpoint.prune(root, 2)

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        for number in (2, 4):
            save(root, number)

    prepare()
    found = points(step, exchange=exchange)
    saved = next(n for n, what in enumerate(found) if what.startswith("after rename .step-000006"))
    for point in sample(found, SHORT, after=CRITICAL):
        what = found[point]
        prepare()
        kill(step, point, exchange=exchange)
        newest = checkpoint.newest(root)
        assert newest is not None, what
        assert newest.position.step == (6 if point >= saved else 4), what
        step()
        assert sorted(os.listdir(root)) == ["step-000004", "step-000006"], what


def row(step: int) -> StepMetrics:
    return StepMetrics(step, step / 3, 1e-4, 0.1, 12.5, 0.0, step / 7)


def write_rows(folder: Path, first: int, last: int) -> None:
    writer = MetricsWriter(folder, first)
    for step in range(first + 1 if first else 0, last + 1):
        writer.write_validation(Measurement(step, step / 7, {0.5: step}))
        if step:
            writer.write(row(step))
    writer.close()


def test_no_row_up_to_the_checkpoint_is_lost(tmp_path: Path) -> None:
    def prepare() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        write_rows(tmp_path / "run", 0, 5)

    prepare()
    found = points(lambda: write_rows(tmp_path / "run", 4, 6))
    for point in sample(found, SHORT, after=CRITICAL):
        what = found[point]
        prepare()
        kill(lambda: write_rows(tmp_path / "run", 4, 6), point)
        assert read_metrics(tmp_path / "run" / "metrics.csv")[:4] == [row(n) for n in range(1, 5)], what
        measured = read_validation(tmp_path / "run" / "validation.csv")
        assert [one.step for one in measured][:5] == list(range(5)), what
        write_rows(tmp_path / "run", 4, 6)
        assert read_metrics(tmp_path / "run" / "metrics.csv") == [row(n) for n in range(1, 7)], what
        assert [one.step for one in read_validation(tmp_path / "run" / "validation.csv")] == list(range(7)), (
            what
        )
        assert not list((tmp_path / "run").glob("*.damaged-*"))


def test_the_recipe_of_a_run_is_never_cut_short(tmp_path: Path, mini_flux: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, mini_flux))
    run = RunFolder(recipe.output.dir)
    begin(run, recipe)
    found = points(lambda: begin(run, recipe))
    for point in sample(found, SHORT, after=CRITICAL):
        what = found[point]
        kill(lambda: begin(run, recipe), point)
        assert written_recipe(run) == recipe, what
        begin(run, recipe)
        assert [file.name for file in run.root.iterdir()] == ["recipe.yaml"], what


def test_a_run_killed_before_it_has_its_recipe_can_be_started_again(tmp_path: Path, mini_flux: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, mini_flux))
    run = RunFolder(recipe.output.dir)
    found = points(lambda: begin(run, recipe))
    for point, what in enumerate(found):
        shutil.rmtree(run.root, ignore_errors=True)
        kill(lambda: begin(run, recipe), point)
        claim(run, recipe, resume=run.recipe.exists())
        begin(run, recipe)
        assert [file.name for file in run.root.iterdir()] == ["recipe.yaml"], what
    (run.root / "recipe.yaml").rename(run.root / "mine.yaml")
    with pytest.raises(RecipeError, match="not empty"):
        claim(run, recipe, resume=False)


QUIET = ("sample.prompts=[]", "validation.held_out=1", "validation.every=1")


@dataclass(frozen=True)
class Whole:
    """A run of 4 steps, from an empty cache, that nothing interrupted."""

    run: Path
    points: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mini_flux: Path) -> Whole:
    assert torch.get_num_threads() == 1
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), mini_flux)
    return Whole(recipe.with_name("run"), points(lambda: run_here(recipe, *QUIET)))


@pytest.fixture(scope="module")
def export(whole: Whole) -> Callable[[RunFolder, int], None]:
    """Exports a checkpoint of the run as `halfbyte export --base` does, with the base loaded once."""
    run = RunFolder(whole.run)
    recipe = written_recipe(run)
    family = open_base(run, recipe.model, FileDigests(recipe.data.cache_folder / "digests"))
    denoiser = load_run_base(recipe, family, torch.device("cpu"), Console(quiet=True))

    def to(target: RunFolder, step: int) -> None:
        adapter = run.checkpoints / f"step-{step:06d}" / ADAPTER_FILE
        settings = ExportSettings("run", None, True, False, step, base_recipe(recipe, family))
        export_saved(family, denoiser, adapter, target, settings)

    return to


def contents(folder: Path) -> dict[str, bytes]:
    """Returns what `tree` does, with the entries of safetensors' headers in order: safetensors writes them in any.

    Checks that the provenance has the digests of the files that are there, and leaves the digests out.
    """
    files = tree(folder)
    # A work folder, whose name begins with a dot, may be half deleted.
    for name in [name for name in files if name.endswith("halfbyte.json") and not name.startswith(".")]:
        facts = json.loads(files[name])
        assert facts.pop("checksum")
        listed = facts.pop("files")
        assert len(listed) >= 4
        for file, digest in listed.items():
            assert sha256_of(files[f"{name.removesuffix('halfbyte.json')}{file}"]) == digest, file
        files[name] = json.dumps(facts).encode()
    for name in [name for name in files if name.endswith(".safetensors") and b"{" in files[name]]:
        end = 8 + int.from_bytes(files[name][:8], "little")
        header = json.loads(files[name][8:end])
        files[name] = json.dumps(header, sort_keys=True).encode() + files[name][end:]
    return files


@BOTH_WAYS
@pytest.mark.parametrize("part", parts())
@pytest.mark.parametrize("earlier", [True, False], ids=["second export", "first export"])
def test_an_export_is_complete_in_each_folder(
    tmp_path: Path, export: Callable[[RunFolder, int], None], earlier: bool, exchange: bool, part: int
) -> None:
    target = RunFolder(tmp_path / "run")
    foreign = {
        "adapter/mine/notes.txt": b"mine",
        "transformer/mine.safetensors": b"mine",
        "mine.txt": b"mine",
    }

    def prepare() -> dict[str, bytes]:
        shutil.rmtree(target.root, ignore_errors=True)
        if earlier:
            export(target, 2)
            for name, content in foreign.items():
                (target.root / name).parent.mkdir(exist_ok=True)
                (target.root / name).write_bytes(content)
        return contents(target.root)

    def below(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
        return {name: content for name, content in files.items() if name.startswith(f"{folder}/")}

    before = prepare()
    found = points(lambda: export(target, 4), exchange=exchange)
    export(target, 4)
    after = contents(target.root)
    assert after.items() >= {name: before[name] for name in before if "mine" in name}.items()
    assert earlier is bool(before)
    chosen = share(list(sample(found, 2, after=RENAMES)), part)
    for point in chosen:
        assert prepare() == before
        kill(lambda: export(target, 4), point, exchange=exchange)
        for place in (target.adapter, target.base):
            if not exchange:
                recover(place)
            left = below(contents(target.root), place.name)
            assert left in (below(before, place.name), below(after, place.name)), found[point]
        export(target, 4)
        assert contents(target.root) == after, found[point]
    kind = f"{'second' if earlier else 'first'} export, {'exchange' if exchange else 'two renames'}"
    report(f"{kind}, killed at one of its {len(found)} file operations", tried=len(chosen), lost=0)


def test_a_quantized_transformer_is_complete_or_absent(tmp_path: Path, mini_flux: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, mini_flux))
    folder, world = tmp_path / "packed", read_world({"ACCELERATE_USE_CPU": "true"})

    def action() -> None:
        quantize(recipe, folder, 0, world, Console(quiet=True))

    found = points(action)
    complete = contents(folder)
    assert len(complete) >= 2
    chosen = list(sample(found, 2, after=RENAMES))
    for point in chosen:
        shutil.rmtree(folder)
        kill(action, point)
        if folder.exists():
            assert contents(folder) == complete, found[point]
        else:
            action()
            assert contents(folder) == complete, found[point]
        assert leftovers(tmp_path) == [], found[point]
    report(f"a quantization killed at one of its {len(found)} file operations", tried=len(chosen), lost=0)


@pytest.mark.parametrize("part", parts())
def test_a_whole_run_killed_anywhere_and_resumed_ends_the_same(
    tmp_path: Path, mini_flux: Path, whole: Whole, part: int
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    run = tmp_path / "run"
    chosen = share(list(sample(whole.points, 2)), part)
    for point in chosen:
        for folder in (run, tmp_path / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        kill(lambda: run_here(recipe, *QUIET), point)
        run_here(recipe, *QUIET, resume=(run / "recipe.yaml").exists())
        what = whole.points[point]
        assert results(run) == results(whole.run), what
        assert leftovers(run) == [], what
        assert sorted(os.listdir(run)) == sorted(os.listdir(whole.run)), what
        assert tree(run / "transformer") == tree(whole.run / "transformer"), what
    report(f"a whole run killed at one of its {len(whole.points)} file operations", tried=len(chosen), lost=0)
