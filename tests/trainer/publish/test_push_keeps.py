"""Pushes to a repository that somebody has worked in: only what a push wrote is a push's to delete."""

import json
import re
import shutil

import pytest

from hub_faults import Faults
from hub_store import Blob, Repository

REPOSITORY = "ann/kept"
CARD = b"---\nlicense: mit\n---\nMy own words\n\n---\n"
THEIRS = {
    "README.md": Blob(CARD, large=False),
    "samples/mine.png": Blob(b"theirs", large=True),
    "transformer/NOTICE": Blob(b"theirs", large=False),
    "comfyui/other.safetensors": Blob(b"theirs", large=True),
    "kohya/dog.safetensors": Blob(b"changed", large=True),
}


@pytest.fixture
def run(pushed_run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(pushed_run, tmp_path / "dog")


@pytest.fixture
def repository(hub, run):
    """It as a push has left it."""
    hub.hub.faults = Faults()
    hub.store.repositories.pop(("model", REPOSITORY), None)
    answer = push(hub, run)
    assert answer.code == 0, answer.output
    return hub.store.model(REPOSITORY)


def push(hub, run, *options):
    return hub.worker.run("push", str(run), "--repo", REPOSITORY, *options)


def without_pictures_and_kohya(run):
    shutil.rmtree(run / "samples")
    shutil.rmtree(run / "adapter" / "kohya")


def test_what_others_wrote_or_changed_is_kept_and_what_is_deleted_is_named(hub, run, repository):
    before = repository.tree
    repository.commit(before | THEIRS)
    without_pictures_and_kohya(run)
    stale = {name for name in before if name.startswith("samples/")}
    for options in (("--dry-run",), ()):
        assert THEIRS.items() <= repository.tree.items()
        answer = push(hub, run, *options)
        assert answer.code == 0, answer.output
        named = set(re.findall("^(.*): deleted, as an earlier push wrote it", answer.output, re.MULTILINE))
        assert named == stale
        assert "README.md: kept as it was written by hand" in answer.output
    assert repository.tree.keys() == (before.keys() | THEIRS.keys()) - stale
    assert THEIRS.items() <= repository.tree.items()
    assert "up to date" in push(hub, run).output
    # Deleted there, it is ours to write again.
    repository.commit({name: blob for name, blob in repository.tree.items() if name != "README.md"})
    assert push(hub, run).code == 0
    assert b"trained with halfbyte" in repository.tree["README.md"].content


def test_a_changed_file_that_the_push_has_again_is_overwritten_and_named(hub, run, repository):
    before = repository.tree
    repository.commit(before | {"adapter_config.json": Blob(b"{}", large=False)})
    answer = push(hub, run)
    assert "adapter_config.json: overwritten, although it was changed by hand" in answer.output
    assert repository.tree == before


def test_the_base_is_deleted_only_where_that_is_asked(hub, run, repository):
    before = repository.tree
    base = {name for name in before if name.startswith("transformer/")}
    shutil.rmtree(run / "transformer")
    answer = push(hub, run)
    assert (answer.code, "is kept; --no-base deletes it" in answer.output) == (0, True), answer.output
    assert base <= repository.tree.keys()
    assert "up to date" in push(hub, run).output
    answer = push(hub, run, "--base")
    assert (answer.code, "has no transformer/; export it" in answer.output) == (2, True), answer.output
    answer = push(hub, run, "--no-base")
    assert answer.code == 0, answer.output
    assert repository.tree.keys() == before.keys() - base


def test_no_base_leaves_an_exported_one_out(hub, run, repository):
    assert push(hub, run, "--no-base").code == 0
    assert not [name for name in repository.tree if name.startswith("transformer/")]
    assert b"FluxTransformer2DModel.from_pretrained" not in repository.tree["README.md"].content


@pytest.mark.parametrize(
    ("card", "written"),
    [(b"---\nlicense: mit\n---\n", True), (b"", True), (CARD, False), (b"# Hello", False)],
)
def test_a_repository_with_a_card_alone_is_a_new_one(hub, run, card, written):
    made = Repository.new(REPOSITORY)
    made.commit(made.tree | {"README.md": Blob(card, large=False)})
    hub.store.add(made)
    hub.hub.faults = Faults()
    answer = push(hub, run)
    assert answer.code == 0, answer.output
    assert "pytorch_lora_weights.safetensors" in made.tree
    assert (made.tree["README.md"].content != card) is written
    assert ("kept as it was written by hand" in answer.output) is not written


def test_a_repository_of_an_unknown_push_loses_nothing(hub, run, repository):
    facts = json.loads(repository.tree["halfbyte.json"].content)
    for odd in ({}, {"pushed": []}, {"pushed": {"samples/00.png": {}}}):
        unknown = {key: value for key, value in facts.items() if key != "pushed"} | odd
        before = repository.tree | {"halfbyte.json": Blob(json.dumps(unknown).encode(), large=False)}
        repository.commit(before)
        shutil.rmtree(run / "samples", ignore_errors=True)
        assert push(hub, run).code == 0
        assert before.keys() == repository.tree.keys()


@pytest.mark.parametrize("outcome", ["drop", "lose", "cut", 403, 429, 503])
def test_a_repeated_push_converges_whatever_goes_wrong(hub, run, repository, outcome):
    """Also at the requests that a first push has no cause to make."""
    repository.commit(repository.tree | THEIRS)
    start = list(repository.commits)
    without_pictures_and_kohya(run)
    faults = hub.hub.faults = Faults()
    assert push(hub, run).code == 0
    wanted, requests = repository.tree, faults.requests
    assert [request for request in requests if request.endswith("halfbyte.json")]
    for place, request in enumerate(requests):
        repository.commits[:] = start
        hub.hub.faults = Faults(outcome, place, again=True)
        answer = push(hub, run)
        where = f"{outcome} at {request}: {answer.output}"
        if not (outcome == "cut" and (request.startswith("HEAD") or "/resolve/" in request)):
            assert answer.code == 4, where
        assert "CRASHED" not in answer.output, where
        hub.hub.faults = Faults()
        assert push(hub, run).code == 0, where
        assert repository.tree == wanted, where
