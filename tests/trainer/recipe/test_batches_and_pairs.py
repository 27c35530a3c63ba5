"""Tests of two settings that depend on others: a batch size for each resolution, and reference images."""

from pathlib import Path

import pytest

from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.recipe.load import load_recipe, load_written
from halfbyte.trainer.recipe.recipe import differences

from small_recipe import Write, problems

BATCHES = """\
model: {family: flux, path: owner/name}
data: {path: ./pictures, resolution: [512, 768, 1024]}
train:
  batch_size:
    512: 4
    768: 2
    1024: 1
output: {dir: out}
"""


def pairs(references: str, per_set: str = "null") -> str:
    return (
        "model: {family: flux, path: owner/name}\n"
        f"data:\n  references: {references}\n  sets:\n    - {{path: ./pictures, references: {per_set}}}\n"
        "    - {path: ./pictures}\noutput: {dir: out}\n"
    )


def test_a_batch_size_for_each_resolution(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(BATCHES))
    assert recipe.train.batch_size == {512: 4, 768: 2, 1024: 1}
    (tmp_path / "written.yaml").write_text(recipe.to_yaml())
    again = load_written(tmp_path / "written.yaml")
    assert again == recipe
    other = load_recipe(write(BATCHES), ["train.batch_size={512: 4, 768: 3, 1024: 1}"])
    assert differences(recipe, other) == ["train.batch_size.768: 2 -> 3"]
    assert load_recipe(write(BATCHES), ["train.batch_size.512=8"]).train.batch_size[512] == 8


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["train.batch_size={1024: 1}"], "{512: 4, 768: 1, 1024: 1}"),
        (["train.batch_size={512: 2, 1024: 2}"], "{512: 2, 768: 3, 1024: 2}"),
        (["data.resolution=768"], "{768: 2}"),
        (["data.resolution=[256, 1024]"], "{256: 16, 1024: 1}"),
    ],
)
def test_batch_sizes_must_name_the_resolutions_of_the_data(
    write: Write, settings: list[str], wanted: str
) -> None:
    (line,) = problems(write(BATCHES), *settings)
    assert "train.batch_size" in line
    assert line.endswith("}")
    assert wanted in line.rpartition("such as ")[2]


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("{512: 4, 768: 2, 1024: 0}", "0"),
        ("{512: x, 768: 2, 1024: 1}", "'x'"),
        ("{a: 1}", "got 'a' as a key, expected one such as 1024"),
        ("{520: 1}", "got '520' as a key"),
        ("[1, 2]", "[1"),
    ],
)
def test_other_batch_sizes_are_refused_with_their_line(write: Write, value: str, wrong: str) -> None:
    text = BATCHES.partition("train:")[0] + f"train:\n  batch_size: {value}\noutput: {{dir: out}}\n"
    lines = problems(write(text))
    assert all(line.startswith("recipe.yaml:4: train.batch_size") for line in lines)
    assert any(wrong in line for line in lines)


@pytest.mark.parametrize(
    ("references", "per_set", "line", "setting"),
    [
        ("{source: files}", "null", 3, "data.references: "),
        ("{source: none}", "{source: columns}", 5, "data.sets[0].references: "),
    ],
)
def test_a_family_without_references_refuses_them(
    write: Write, references: str, per_set: str, line: int, setting: str
) -> None:
    (problem,) = problems(write(pairs(references, per_set)))
    assert problem.startswith(f"recipe.yaml:{line}: {setting}")
    assert "flux" in problem
    assert problem.endswith("families that do: none yet")


def test_a_family_with_references_takes_them(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux, "max_references", 1)
    text = pairs("{source: folders, folders: [./pictures]}", "{source: none}")
    first, second = load_recipe(write(text)).data.resolved_sets
    assert first.references.source == "none"
    assert [folder.name for folder in second.references.folders] == ["pictures"]
    assert second.references.folders[0].is_absolute()
    (problem,) = problems(write(text.replace("family: flux", "family: sd3")))
    assert problem.endswith("families that do: flux")


@pytest.mark.parametrize(
    ("references", "field"),
    [
        ("{source: folders}", "references.folders"),
        ("{source: files, folders: [./pictures]}", "references.folders"),
        ("{source: folders, folders: [./missing]}", "references.folders[0]"),
        ("{source: files, columns: [a]}", "references.columns"),
        ("{resolution: 512}", "references.resolution"),
        ("{source: files, resolution: 500}", "references.resolution"),
        ("{source: pairs}", "references.source"),
    ],
)
def test_contradicting_references_are_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch, references: str, field: str
) -> None:
    monkeypatch.setattr(Flux, "max_references", 1)
    (line,) = problems(write(pairs(references)))
    assert line.startswith(f"recipe.yaml:3: data.{field}: ")
