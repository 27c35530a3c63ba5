"""Tests of data sets on a loopback Hub: what is downloaded, what is trained, and that a resume stays at the commit."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from hub_faults import Faults
from hub_store import Blob, Repository, Store
from loopback_hub import State, serving
from push_worker import PushWorker
from runs import results, run_here, write_pictures, write_recipe

QUICK = ("sample.prompts=[]", "output.export_base=false", "train.grad_accumulation=1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("hub_data") / "pictures")


def parquet(pictures: Path, count: int = 6) -> bytes:
    files = sorted(pictures.glob("*.png"))[:count]
    table = {
        "jpg": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "text": [file.with_suffix(".txt").read_text() for file in files],
    }
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), stream)
    return stream.getvalue()


def tar(pictures: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for file in sorted(pictures.iterdir()):
            archive.add(file, file.name)
    return stream.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[tuple[State, PushWorker]]:
    store = Store()
    forms = {
        "parquet": {"data/train-0.parquet": parquet(pictures), "data/test-0.parquet": parquet(pictures, 2)},
        "tars": {"train/0.tar": tar(pictures), "val/0.tar": b"not a tar file"},
        "folder": {f"dogs/{file.name}": file.read_bytes() for file in pictures.iterdir()},
        "empty": {"data.csv": b"a,b\n"},
    }
    for name, files in forms.items():
        repository = store.add(Repository.new(f"ann/{name}", kind="dataset"))
        repository.commit({file: Blob(data, large=True) for file, data in files.items()})
    with (
        serving(store) as state,
        PushWorker(state.endpoint, tmp_path_factory.mktemp("hub_data") / "home", None) as worker,
    ):
        yield state, worker


def fetched(faults: Faults) -> set[str]:
    found = (re.fullmatch(r"GET /datasets/ann/\w+/resolve/\w+/(.+)", line) for line in faults.requests)
    return {match[1] for match in found if match} - {".gitattributes"}


def test_a_run_trains_on_the_files_of_its_split_and_stays_at_its_commit(
    hub: tuple[State, PushWorker], pictures: Path, mini_flux: Path, tmp_path: Path
) -> None:
    state, worker = hub
    state.faults = faults = Faults()
    recipe = write_recipe(tmp_path, mini_flux)
    settings = (*QUICK, "data.path=hf://datasets/ann/parquet", "data.image_column=jpg")
    answer = worker.run("train", str(recipe), *settings, "train.steps=2")
    assert answer.code == 0, answer.output
    assert fetched(faults) == {"data/train-0.parquet"}
    repository = state.store.repositories["dataset", "ann/parquet"]
    commit = repository.head
    assert json.loads((tmp_path / "run" / "base.json").read_text())["commits"] == {"data.path": commit}
    assert "path: hf://datasets/ann/parquet\n" in (tmp_path / "run" / "recipe.yaml").read_text()

    # The main branch moves; the run goes on with the data of its start, as a run on the same images in a folder does.
    repository.commit(repository.tree | {"data/train-0.parquet": Blob(parquet(pictures, 3), large=True)})
    answer = worker.run("train", str(recipe), *settings, "--resume")
    assert answer.code == 0, answer.output
    local = tmp_path / "local"
    local.mkdir()
    expected = run_here(write_recipe(local, mini_flux), *QUICK)
    assert results(tmp_path / "run") == results(expected)

    answer = worker.run(
        "train", str(recipe), *settings[:-2], f"data.path=hf://datasets/ann/parquet@{repository.head}",
        "data.image_column=jpg", "train.steps=6", "--resume",
    )  # fmt: skip
    assert (answer.code, f"was started on hf://datasets/ann/parquet@{commit}" in answer.output) == (2, True)


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("tars", {"train/0.tar"}),
        ("tars@main/train", set()),  # downloaded before
        (
            "folder/dogs/picture[0-2]*",
            {f"dogs/picture{n}.{kind}" for n in range(3) for kind in ("png", "txt")},
        ),
        ("folder", {f"dogs/picture{n}.{kind}" for n in range(3, 6) for kind in ("png", "txt")}),
    ],
)
def test_other_forms_are_read(
    hub: tuple[State, PushWorker], mini_flux: Path, tmp_path: Path, path: str, files: set[str]
) -> None:
    state, worker = hub
    recipe = write_recipe(tmp_path, mini_flux)
    page = tmp_path / "page.html"
    state.faults = faults = Faults()
    answer = worker.run("data", str(recipe), f"data.path=hf://datasets/ann/{path}", "--page", str(page))
    assert answer.code == 0, answer.output
    assert fetched(faults) == files
    assert page.read_text().count("<figure>") == (3 if "[" in path else 6)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (
            ("data.path=hf://datasets/ann/parquet", "data.split=dev"),
            3,
            "has no split 'dev', expected train or test",
        ),
        (("data.path=hf://datasets/ann/parquet", "data.config=x"), 3, "has no configuration 'x'"),
        (("data.path=hf://datasets/ann/none",), 4, "the Hub has no data set ann/none"),
        (("data.path=hf://datasets/ann/empty",), 3, "no parquet or tar files and no images"),
        (("data.path=hf://datasets/ann/parquet@old",), 4, "no revision 'old'"),
        (("data.path=hf://ann/parquet",), 2, "expected hf://datasets/owner/name"),
        (("validation.path=hf://datasets/ann/parquet",), 2, "expected a local folder"),
        (("data.config=x",), 3, "is not on the Hub"),
    ],
)
def test_what_the_hub_does_not_have(
    hub: tuple[State, PushWorker],
    mini_flux: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    state, worker = hub
    state.faults = Faults()
    recipe = write_recipe(tmp_path, mini_flux)
    answer = worker.run("data", str(recipe), *settings, "--page", str(tmp_path / "page.html"))
    assert (answer.code, message in answer.output) == (code, True), answer.output
