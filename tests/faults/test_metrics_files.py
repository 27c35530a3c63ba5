"""Tests that damaged small files of a run are noticed, kept where they can be used, and never a traceback."""

import json
import random
from pathlib import Path

import pytest

from halfbyte.quant.files.digest import file_digest
from halfbyte.trainer.errors import HalfbyteError, RecipeError
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder import pinned_base
from halfbyte.trainer.run_folder.folder import RunFolder, begin, claim, written_recipe
from halfbyte.trainer.run_folder.pinned_base import PinnedBase, pinned_commits
from halfbyte.trainer.training.metrics import (
    Measurement,
    MetricsWriter,
    StepMetrics,
    read_metrics,
    read_validation,
)

from runs import write_recipe

SIGMAS = (0.25, 0.5)


def row(step: int) -> StepMetrics:
    return StepMetrics(step, step / 3, 1e-4, 0.1, 12.5, 0.0, step / 7 if step % 2 == 0 else None)


def measured(step: int) -> Measurement:
    return Measurement(step, step / 7, {sigma: step + sigma for sigma in SIGMAS})


def write(folder: Path, first: int, last: int) -> None:
    """Writes what a run from `first` to `last` writes."""
    writer = MetricsWriter(folder, first)
    if first == 0:
        writer.write_validation(measured(0))
    for step in range(first + 1, last + 1):
        if step % 2 == 0:
            writer.write_validation(measured(step))
        writer.write(row(step))
    writer.close()


def resumed(folder: Path, at: int = 4) -> tuple[list[StepMetrics], list[Measurement]]:
    write(folder, at, 6)
    return read_metrics(folder / "metrics.csv"), read_validation(folder / "validation.csv")


def kept(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.damaged-*"))


WHOLE = [row(step) for step in range(1, 7)]
MEASURED = [measured(step) for step in (0, 2, 4, 6)]


def test_a_run_that_starts_at_step_0_starts_its_files_again(tmp_path: Path) -> None:
    """A run killed before its first checkpoint starts again, and measures step 0 again."""
    write(tmp_path, 0, 1)
    write(tmp_path, 0, 6)
    assert read_metrics(tmp_path / "metrics.csv") == WHOLE
    assert read_validation(tmp_path / "validation.csv") == MEASURED


def spreadsheet(text: str) -> bytes:
    """Saves as a spreadsheet does where the decimal point is a comma."""
    return b"\xef\xbb\xbf" + text.replace(",", ";").replace(".", ",").encode()


def reordered(text: str) -> bytes:
    lines = [line.split(",") for line in text.splitlines()]
    return "\n".join(",".join([line[1], line[0], *line[2:]]) for line in lines).encode()


WITHOUT_LOSS = {
    "spreadsheet": (spreadsheet, 1),
    "UTF-16": (lambda text: text.encode("utf-16"), 1),
    "reordered": (reordered, 1),
    "header": (lambda text: text.replace("loss", "lnss", 1).encode(), 1),
}


@pytest.mark.parametrize("damage", WITHOUT_LOSS)
@pytest.mark.parametrize("name", ["metrics.csv", "validation.csv"])
def test_a_file_in_another_form_is_read_whole_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    write(tmp_path, 0, 4)
    change, line = WITHOUT_LOSS[damage]
    content = change((tmp_path / name).read_bytes().decode())
    (tmp_path / name).write_bytes(content)
    assert resumed(tmp_path) == (WHOLE, MEASURED)
    stem = name.removesuffix(".csv")
    assert kept(tmp_path) == [f"{stem}.damaged-1.csv"]
    assert (tmp_path / f"{stem}.damaged-1.csv").read_bytes() == content
    (warning,) = [record.getMessage() for record in caplog.records]
    if name == "metrics.csv":
        assert f"line {line}:" in warning
    # The next start finds nothing wrong.
    assert resumed(tmp_path) == (WHOLE, MEASURED)
    assert len(kept(tmp_path)) == 1


def test_the_end_that_a_crash_left_is_skipped_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a power loss the end of a file may be NULs, or half a row."""
    for end in (b"\0" * 4096, b"5,0.1,0.0"):
        write(tmp_path, 0, 4)
        with (tmp_path / "metrics.csv").open("ab") as file:
            file.write(end)
        assert resumed(tmp_path) == (WHOLE, MEASURED)
    assert not kept(tmp_path)
    assert not caplog.records


LOST = {
    "not UTF-8": (lambda content: content.replace(b"\r\n2,", b"\r\n\xb2,"), 2),
    "a NUL": (lambda content: content.replace(b"\r\n3,", b"\r\n3\0,"), 3),
    "a quote": (lambda content: content.replace(b"\r\n2,", b'\r\n",'), 2),
    "a step": (lambda content: content.replace(b"\r\n2,", b"\r\n9,"), 2),
    "half a line": (lambda content: content.replace(b",0.1,12.5,0.0,,\r\n4", b"\r\n4"), 3),
}


@pytest.mark.parametrize("damage", LOST)
def test_only_the_damaged_row_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    write(tmp_path, 0, 4)
    file = tmp_path / "metrics.csv"
    change, lost = LOST[damage]
    content = change(file.read_bytes())
    assert content != file.read_bytes()
    file.write_bytes(content)
    assert resumed(tmp_path)[0] == [one for one in WHOLE if one.step != lost]
    assert (tmp_path / "metrics.damaged-1.csv").read_bytes() == content
    assert f"line {lost + 1}:" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\r\n", b"step,loss\r\n"])
@pytest.mark.parametrize("name", ["metrics.csv", "validation.csv"])
def test_a_file_without_rows_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    """A run that is killed before its first row leaves the header only."""
    write(tmp_path, 0, 0)
    assert read_metrics(tmp_path / "metrics.csv") == []
    assert resumed(tmp_path)[0] == WHOLE[4:]
    (tmp_path / name).write_bytes(content)
    assert (read_metrics if name == "metrics.csv" else read_validation)(tmp_path / name) == []
    resumed(tmp_path)


def test_columns_that_are_gone_cost_the_rows_but_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0, 4)
    file = tmp_path / "metrics.csv"
    file.write_text("\n".join(line.split(",", 2)[0] for line in file.read_text().splitlines()))
    assert resumed(tmp_path)[0] == WHOLE[4:]
    assert kept(tmp_path) == ["metrics.damaged-1.csv"]
    assert "no column loss" in caplog.text


def test_every_flipped_bit_is_survived(tmp_path: Path) -> None:
    """Rows are either lost, which is reported, or differ in one number; the file is never written wrong again."""
    write(tmp_path, 0, 4)
    intact = {name: (tmp_path / name).read_bytes() for name in ("metrics.csv", "validation.csv")}
    bits = [(name, bit) for name, content in intact.items() for bit in range(8 * len(content))]
    for name, bit in random.Random(0).sample(bits, 40):
        for other, content in intact.items():
            (tmp_path / other).write_bytes(content)
        for copy in tmp_path.glob("*.damaged-*"):
            copy.unlink()
        damaged = bytearray(intact[name])
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(damaged)
        rows, measurements = resumed(tmp_path)
        wrong = [one for one in rows if one not in WHOLE]
        missing = [one for one in WHOLE if one.step not in [two.step for two in rows]]
        assert len(wrong) <= 1
        assert not missing or kept(tmp_path), (name, bit)
        assert rows[-2:] == WHOLE[-2:]
        assert measurements[-1] == MEASURED[-1]
        assert len(measurements) == 4 or kept(tmp_path), (name, bit)


def test_a_damaged_digest_is_not_believed(tmp_path: Path) -> None:
    file, memo = tmp_path / "weights", tmp_path / "memo"
    file.write_bytes(b"weights")
    digests, digest = FileDigests(memo), file_digest(file)
    assert digests.of(file) == digest
    (remembered,) = memo.iterdir()
    content = remembered.read_bytes()
    for bit in range(0, 8 * len(content), 7):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        remembered.write_bytes(damaged)
        assert digests.known(file) is None
    assert digests.of(file) == digest
    remembered.write_text(digest)  # as version 0.2 wrote it
    assert digests.known(file) == digest


@pytest.fixture
def run(tmp_path: Path, mini_flux: Path) -> RunFolder:
    """The folder of a run that has an exported adapter, so that its settings are fixed."""
    recipe = load_recipe(write_recipe(tmp_path, mini_flux))
    folder = RunFolder(recipe.output.dir)
    begin(folder, recipe)
    folder.adapter.mkdir()
    pinned = PinnedBase({"model.path": "0" * 40}, None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned_base, "base_of", lambda family, digests: pinned)
        folder.adapter.rmdir()
        pinned_base.pin_base(folder, type("Family", (), {"commits": pinned.commits}), None, {})  # type: ignore[arg-type]
        folder.adapter.mkdir()
    return folder


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 40, b"model: {", b"[1]", b"train: {steps: many}", b"\xff\xfe"]
)
def test_a_damaged_copy_of_the_recipe_is_one_message(run: RunFolder, tmp_path: Path, content: bytes) -> None:
    recipe = load_recipe(tmp_path / "run.yaml")
    run.recipe.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        claim(run, recipe, resume=True)
    assert str(run.recipe) in str(caught.value)
    assert "delete it" in str(caught.value)
    run.recipe.unlink()  # the advice
    claim(run, recipe, resume=True)


def test_every_flipped_bit_of_the_recipe_is_noticed(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    content = run.recipe.read_bytes()
    written_recipe(run)
    assert not caplog.records
    for bit in random.Random(0).sample(range(8 * len(content)), 15):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        run.recipe.write_bytes(damaged)
        caplog.clear()
        try:
            found = written_recipe(run)
        except RecipeError:
            continue
        last = content.rindex(b"#")
        assert caplog.records or (bit // 8 >= last and found), f"bit {bit}"


@pytest.mark.parametrize(
    "content", ["", "[]", '"revision"', '{"commits": 5}', "[" * 10**5, '{"commits": {"a": []}}']
)
def test_a_damaged_pin_of_the_base_is_one_message(run: RunFolder, content: str) -> None:
    assert pinned_commits(run) == {"model.path": "0" * 40}
    facts = json.loads(run.pin.read_text())
    if content.startswith("{"):
        content = json.dumps({**facts, **json.loads(content), "checksum": None})
    run.pin.write_text(content)
    with pytest.raises(HalfbyteError) as caught:
        pinned_commits(run)
    assert str(run.pin) in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_flipped_bit_of_the_pin_is_noticed(run: RunFolder) -> None:
    content = run.pin.read_bytes()
    whole = pinned_commits(run)
    for bit in range(0, 8 * len(content), 11):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        run.pin.write_bytes(damaged)
        try:
            found = pinned_commits(run)
        except RecipeError:
            continue
        assert found == whole, f"bit {bit}"
