"""The paths of a recipe: where they start from, and what must be there."""

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


def test_folders_that_are_not_there_are_problems_of_the_recipe(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = write("model: {family: flux, path: ./mini}\ndata: {path: ./photoz}\noutput: {dir: ../file}\n")
    assert problems(path) == [
        "recipe.yaml:1: model.path: got './mini', but there is no folder mini",
        "recipe.yaml:2: data.path: got './photoz', but there is no folder photoz",
        "recipe.yaml:3: output.dir: got '../file', expected a folder; file is a file",
    ]
    assert problems(path, "model.path=owner/name", "data.path=", "output.dir=''")[0].endswith(
        "got null, expected a path"
    )
    (problem,) = problems(write(SMALL), f"data.path={'x' * 5000}")
    assert "which cannot be used as a path" in problem
    assert problems(write(SMALL), "output.dir=../pictures/run") == [
        "command line: output.dir=../pictures/run: pictures/run is inside data.path;"
        " its pictures would be trained on at the next start"
    ]


@pytest.mark.parametrize("path", ["owner/name", "black-forest-labs/FLUX.1-dev", "a/b_c.d-e", "0x/1"])
def test_hub_repositories_are_recognized(write: Write, path: str) -> None:
    assert load_recipe(write(SMALL), [f"model.path={path}"]).model.path == path


@pytest.mark.parametrize(
    "path", ["flux", "a/b/c", "a b/c", "a/b--c", "a/..", "-a/b", "a/b.", "https://x/y", "é/b"]
)
def test_what_is_neither_repository_nor_folder_is_refused(write: Write, path: str) -> None:
    (problem,) = problems(write(SMALL), f"model.path={path}")
    assert "expected a Hub repository as owner/name, or a folder" in problem


def test_a_folder_named_like_a_repository_must_be_told_apart(write: Write, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "owner" / "name").mkdir(parents=True)
    (problem,) = problems(write(SMALL))
    assert "write './owner/name' for the folder" in problem
    recipe = load_recipe(write(SMALL), ["model.path=./owner/name"])
    assert recipe.model.path == str(tmp_path / "elsewhere" / "owner" / "name")


def test_a_folder_has_no_revision(write: Write, tmp_path: Path) -> None:
    (problem,) = problems(write(SMALL), f"model.path={tmp_path}", "model.revision=main")
    assert (
        problem == f"command line: model.revision=main: got 'main', but {tmp_path} is a folder; expected null"
    )
    assert load_recipe(write(SMALL), ["model.revision=main"]).model.revision == "main"


def test_a_revision_must_be_one(write: Write) -> None:
    for field in ("model.transformer", "model.text_encoder", "lora.init_from"):
        (problem,) = problems(write(SMALL), f"{field}=ann/dog@")
        assert problem == (
            f"command line: {field}=ann/dog@: got 'ann/dog@', expected a branch, tag or commit behind the @, or"
            " owner/name alone"
        )
    for named in ("ann/dog", "ann/dog@v1.0", "ann/dog@refs/pr/2"):
        recipe = load_recipe(write(SMALL), [f"model.text_encoder={named}"])
        assert recipe.to_yaml().count(f"text_encoder: {named}\n") == 1
    (problem,) = problems(write(SMALL), "model.path=ann/dog@v1")
    assert problem.endswith("in front; write model.revision: v1")
    (problem,) = problems(write(SMALL), "model.text_encoder=../recipe.yaml")
    assert "expected a folder" in problem
    (problem,) = problems(write(SMALL), "model.text_encoder=./nothing")
    assert problem.endswith("; expected one, or a Hub repository as owner/name")
