"""Tests pushes to a repository that somebody has edited: a push deletes only files that a push wrote."""

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
    """A copy of the run that a test may change."""
    return shutil.copytree(pushed_run, tmp_path / "dog")


@pytest.fixture
def repository(hub, run):
    """The repository after a push."""
    hub.hub.faults = Faults()
    hub.store.repositories.pop(("model", REPOSITORY), None)
    answer = push(hub, run)
    assert answer.code == 0, answer.output
    return hub.store.model(REPOSITORY)


def push(hub, run, *options):
    return hub.worker.run("push", str(run), "--repo", REPOSITORY, *options)


def remove_samples_and_kohya(run):
    shutil.rmtree(run / "samples")
    shutil.rmtree(run / "adapter" / "kohya")


def test_files_of_others_are_kept_and_deleted_files_are_named(hub, run, repository):
    before = repository.tree
    repository.commit(before | THEIRS)
    remove_samples_and_kohya(run)
    stale = {name for name in before if name.startswith("samples/")}
    for options in (("--dry-run",), ()):
        assert THEIRS.items() <= repository.tree.items()
        answer = push(hub, run, *options)
        assert answer.code == 0, answer.output
        named = set(re.findall("^(.*): deleted\\b", answer.output, re.MULTILINE))
        assert named == stale
        assert "README.md: kept" in answer.output
    assert repository.tree.keys() == (before.keys() | THEIRS.keys()) - stale
    assert THEIRS.items() <= repository.tree.items()
    assert "up to date" in push(hub, run).output
    # After the card is deleted on the Hub, a push writes it again.
    repository.commit({name: blob for name, blob in repository.tree.items() if name != "README.md"})
    assert push(hub, run).code == 0
    assert b"trained with halfbyte" in repository.tree["README.md"].content


def test_a_changed_file_of_the_push_is_overwritten_and_named(hub, run, repository):
    before = repository.tree
    repository.commit(before | {"adapter_config.json": Blob(b"{}", large=False)})
    answer = push(hub, run)
    assert "adapter_config.json: overwritten" in answer.output
    assert repository.tree == before


def test_the_base_is_deleted_only_on_request(hub, run, repository):
    before = repository.tree
    base = {name for name in before if name.startswith("transformer/")}
    shutil.rmtree(run / "transformer")
    answer = push(hub, run)
    assert (answer.code, "transformer/: kept" in answer.output) == (0, True), answer.output
    assert "--no-base" in answer.output
    assert base <= repository.tree.keys()
    assert "up to date" in push(hub, run).output
    answer = push(hub, run, "--base")
    assert (answer.code, "error: --base: " in answer.output) == (2, True), answer.output
    answer = push(hub, run, "--no-base")
    assert answer.code == 0, answer.output
    assert repository.tree.keys() == before.keys() - base


def test_no_base_leaves_out_an_exported_base(hub, run, repository):
    assert push(hub, run, "--no-base").code == 0
    assert not [name for name in repository.tree if name.startswith("transformer/")]
    assert b"FluxTransformer2DModel.from_pretrained" not in repository.tree["README.md"].content


@pytest.mark.parametrize(
    ("card", "written"),
    [(b"---\nlicense: mit\n---\n", True), (b"", True), (CARD, False), (b"# Hello", False)],
)
def test_a_repository_with_only_a_card_counts_as_new(hub, run, card, written):
    repository = Repository.new(REPOSITORY)
    repository.commit(repository.tree | {"README.md": Blob(card, large=False)})
    hub.store.add(repository)
    hub.hub.faults = Faults()
    answer = push(hub, run)
    assert answer.code == 0, answer.output
    assert "pytorch_lora_weights.safetensors" in repository.tree
    assert (repository.tree["README.md"].content != card) is written
    assert ("README.md: kept" in answer.output) is not written


def test_nothing_is_deleted_without_a_record_of_the_last_push(hub, run, repository):
    facts = json.loads(repository.tree["halfbyte.json"].content)
    for odd in ({}, {"pushed": []}, {"pushed": {"samples/00.png": {}}}):
        unknown = {key: value for key, value in facts.items() if key != "pushed"} | odd
        before = repository.tree | {"halfbyte.json": Blob(json.dumps(unknown).encode(), large=False)}
        repository.commit(before)
        shutil.rmtree(run / "samples", ignore_errors=True)
        assert push(hub, run).code == 0
        assert before.keys() == repository.tree.keys()


@pytest.mark.parametrize("outcome", ["drop", "lose", "cut", 403, 429, 503])
def test_a_repeated_push_converges_after_any_failure(hub, run, repository, outcome):
    """Covers the requests that a first push does not make."""
    repository.commit(repository.tree | THEIRS)
    start = list(repository.commits)
    remove_samples_and_kohya(run)
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
