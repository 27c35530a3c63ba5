"""Tests of the paths in a recipe: what they are relative to, and which must exist."""

from pathlib import Path

import pytest

from halfbyte.trainer.recipe.load import load_recipe

from small_recipe import SMALL, Write, problems


def test_paths_start_from_where_they_were_written(write: Write, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    for folder in (tmp_path / "models" / "a", here / "models" / "a", here / "pictures"):
        folder.mkdir(parents=True)
    path = write(
        "model: {family: flux, path: ./models/a}\n"
        "data: {path: pictures, cache_dir: ../cache}\n"
        "output: {dir: runs/a}\n"
    )
    recipe = load_recipe(path)
    assert recipe.model.path == str(tmp_path / "models" / "a")
    assert recipe.data.path == tmp_path / "pictures"
    assert recipe.data.cache_folder == tmp_path.parent / "cache"
    assert recipe.output.dir == here / "runs" / "a"
    recipe = load_recipe(path, ["model.path=./models/a", "data.path=pictures", "data.cache_dir=~/x"])
    assert recipe.model.path == str(here / "models" / "a")
    assert recipe.data.path == here / "pictures"
    assert recipe.data.cache_folder == Path.home() / "x"


def test_missing_folders_are_reported_with_file_and_line(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = write("model: {family: flux, path: ./mini}\ndata: {path: ./photoz}\noutput: {dir: ../file}\n")
    model, data, output = problems(path)
    assert model.startswith("recipe.yaml:1: model.path: got './mini',")
    assert "no folder mini" in model
    assert data.startswith("recipe.yaml:2: data.path: got './photoz',")
    assert "no folder photoz" in data
    assert output.startswith("recipe.yaml:3: output.dir: got '../file',")
    assert "file is a file" in output
    empty = problems(path, "model.path=owner/name", "data.path=", "output.dir=''")[0]
    assert empty.startswith("command line: data.path=: missing")
    (problem,) = problems(write(SMALL), f"data.path={'x' * 5000}")
    assert problem.startswith("command line: data.path=xxx")
    assert "path: " in problem
    (problem,) = problems(write(SMALL), "output.dir=../pictures/run")
    assert problem.startswith("command line: output.dir=../pictures/run: pictures/run ")
    assert "inside data.path" in problem


def test_images_may_be_one_parquet_file_but_no_other_file(write: Write, tmp_path: Path) -> None:
    path = write(SMALL)
    table, other = tmp_path / "train.parquet", tmp_path / "train.csv"
    for file in (table, other):
        file.touch()
    fields = ("data.path", "validation.path", "sample.references")
    recipe = load_recipe(path, ["sample.prompts=[a]", *(f"{field}={table}" for field in fields)])
    assert recipe.data.path == recipe.validation.path == recipe.sample.references == table
    for field in (*fields, "data.cache_dir", "output.dir"):
        found = problems(path, f"{field}={other if field in fields else table}")
        (problem,) = [line for line in found if "is a file" in line]
        assert (".parquet file; " in problem) == (field in fields)


@pytest.mark.parametrize("path", ["owner/name", "black-forest-labs/FLUX.1-dev", "a/b_c.d-e", "0x/1"])
def test_hub_repositories_are_recognized(write: Write, path: str) -> None:
    assert load_recipe(write(SMALL), [f"model.path={path}"]).model.path == path


@pytest.mark.parametrize(
    "path", ["flux", "a/b/c", "a b/c", "a/b--c", "a/..", "-a/b", "a/b.", "https://x/y", "é/b"]
)
def test_a_path_that_is_neither_repository_nor_folder_is_refused(write: Write, path: str) -> None:
    (problem,) = problems(write(SMALL), f"model.path={path}")
    assert problem.startswith(f"command line: model.path={path}: got ")
    assert "owner/name" in problem
    assert "folder" in problem


def test_a_name_of_both_a_folder_and_a_repository_is_ambiguous(write: Write, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "owner" / "name").mkdir(parents=True)
    (problem,) = problems(write(SMALL))
    assert "'./owner/name'" in problem
    recipe = load_recipe(write(SMALL), ["model.path=./owner/name"])
    assert recipe.model.path == str(tmp_path / "elsewhere" / "owner" / "name")


def test_a_folder_has_no_revision(write: Write, tmp_path: Path) -> None:
    (problem,) = problems(write(SMALL), f"model.path={tmp_path}", "model.revision=main")
    assert problem.startswith("command line: model.revision=main: got 'main',")
    assert f"{tmp_path} is a folder" in problem
    assert "null" in problem
    assert load_recipe(write(SMALL), ["model.revision=main"]).model.revision == "main"


def test_an_empty_or_misplaced_revision_is_refused(write: Write) -> None:
    for field in ("model.transformer", "model.text_encoder", "lora.init_from"):
        (problem,) = problems(write(SMALL), f"{field}=ann/dog@")
        assert problem.startswith(f"command line: {field}=ann/dog@: got 'ann/dog@',")
        assert "branch, tag or commit" in problem
        assert "owner/name" in problem
    for named in ("ann/dog", "ann/dog@v1.0", "ann/dog@refs/pr/2"):
        recipe = load_recipe(write(SMALL), [f"model.text_encoder={named}"])
        assert recipe.to_yaml().count(f"text_encoder: {named}\n") == 1
    (problem,) = problems(write(SMALL), "model.path=ann/dog@v1")
    assert problem.endswith("model.revision: v1")
    (problem,) = problems(write(SMALL), "model.text_encoder=../recipe.yaml")
    assert "expected a folder" in problem
    (problem,) = problems(write(SMALL), "model.text_encoder=./nothing")
    assert problem.startswith("command line: model.text_encoder=./nothing: got './nothing',")
    assert problem.endswith("owner/name")
