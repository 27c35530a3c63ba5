"""Tests that an impossible push is reported before anything is loaded, and that a late failure loses nothing."""

import json

import pytest

from hub_faults import Faults
from hub_runs import BASE, TOKEN
from hub_store import Blob, Repository, account
from runs import write_recipe
from small_recipe import SMALL, problems

READER, NARROW, WIDE, GUEST = "hf_mayOnlyRead", "hf_fineButNotHere", "hf_fineAndHere", "hf_contributor"


def scoped(name, *permissions):
    return {"scoped": [{"entity": {"type": "user", "name": name}, "permissions": list(permissions)}]}


@pytest.fixture
def fresh(hub):
    """The Hub with several accounts and no faults. The worker uses the first account's token."""
    accounts = hub.store.accounts
    accounts[READER] = account("ann", role="read")
    accounts[NARROW] = account("ann", role="fineGrained", fineGrained=scoped("ann", "repo.content.read"))
    accounts[WIDE] = account(
        "ann", role="fineGrained", fineGrained=scoped("ann", "repo.content.read", "repo.write")
    )
    accounts[GUEST] = account("bob", orgs={"we": "contributor"})
    hub.hub.faults = Faults()
    yield hub
    hub.hub.faults = Faults()
    hub.worker.run("schema", token=TOKEN)


def start(hub, repository, token=TOKEN):
    recipe = write_recipe(hub.folder, "./base", name="never")
    return hub.worker.run(
        "train", str(recipe), f"model.path={BASE}", f"output.push_to_hub={repository}", token=token
    )


def settings_page(hub):
    return f"{hub.hub.endpoint}/settings/tokens"


@pytest.mark.parametrize(
    ("repository", "token", "facts"),
    [
        ("ann/x", "", ("not logged in", "hf auth login", "{tokens}")),
        ("ann/x", "hf_nobodyKnows", ("401", "token", "{tokens}")),
        ("ann/x", "hf_bröken", ("characters", "{tokens}")),
        ("ann/x", READER, ("read-only", "{tokens}")),
        ("ann/x", NARROW, ("repositories of ann;", "repo.write", "{tokens}")),
        ("eve/x", TOKEN, ("eve/x", "ann, we, readers", "output.push_to_hub", "{tokens}")),
        ("readers/x", TOKEN, ("ann", "read role", "organization readers")),
    ],
)
def test_a_token_that_cannot_push_is_reported_before_anything_is_loaded(fresh, repository, token, facts):
    answer = start(fresh, repository, token)
    assert answer.code == 4, answer.output
    (message,) = [line for line in answer.output.splitlines() if line.startswith("error: push: ")]
    for fact in facts:
        assert fact.format(tokens=settings_page(fresh)) in message
    assert answer.output.count("error:") == 1
    assert not token or token not in answer.output
    assert not any(BASE in request for request in fresh.hub.faults.requests)
    assert not (fresh.folder / "never").exists()


def add_foreign_model(fresh):
    repository = Repository.new("ann/bert")
    repository.commit(repository.tree | {"pytorch_model.bin": Blob(b"theirs", large=True)})
    fresh.store.add(repository)


@pytest.mark.parametrize(
    "name", ["dog", "ann/dog.git", "ann/a--b", "./ann/dog", "https://huggingface.co/ann/dog", ""]
)
def test_an_invalid_name_is_reported_with_its_line(write, name):
    recipe = write(SMALL.replace("dir: out", f"dir: out, push_to_hub: '{name}'"))
    (line,) = problems(recipe)
    assert line.startswith(f"recipe.yaml:3: output.push_to_hub: got '{name}', ")
    assert "owner/name" in line


@pytest.mark.parametrize(
    ("add", "repository", "facts"),
    [
        (
            lambda f: f.store.add(Repository.new("ann/pictures", kind="dataset")),
            "ann/pictures",
            ("dataset", "/datasets/ann/pictures"),
        ),
        (
            lambda f: f.store.add(Repository.new("ann/demo", kind="space")),
            "ann/demo",
            ("space", "/spaces/ann/demo"),
        ),
        (add_foreign_model, "ann/bert", ("(pytorch_model.bin)", "overwrite", "/ann/bert/tree/main")),
    ],
)
def test_a_repository_of_another_kind_or_content_is_rejected(fresh, pushed_run, add, repository, facts):
    add(fresh)
    before = {key: list(existing.commits) for key, existing in fresh.store.repositories.items()}
    answer = start(fresh, repository)
    assert answer.code == 4, answer.output
    assert all(fact in answer.output for fact in (repository, *facts)), answer.output
    assert f"{fresh.hub.endpoint}/" in answer.output
    answer = fresh.worker.run("push", str(pushed_run), "--repo", repository)
    assert answer.code == 4, answer.output
    assert all(fact in answer.output for fact in (repository, *facts)), answer.output
    assert {key: existing.commits for key, existing in fresh.store.repositories.items()} == before


def test_the_hub_is_asked_for_write_access(fresh):
    """A contributor to an organization may create repositories there, but may not write to those of others."""
    repository = fresh.store.add(Repository.new("we/theirs"))
    fresh.hub.faults = Refusing("/auth-check/write")
    answer = start(fresh, "we/theirs", GUEST)
    assert answer.code == 4, answer.output
    assert "we/theirs" in answer.output
    assert "403" in answer.output
    assert settings_page(fresh) in answer.output
    assert len(repository.commits) == 1


def test_a_renamed_repository_is_reported_with_its_new_name(fresh, pushed_run):
    fresh.store.repositories["model", "ann/old"] = fresh.store.add(Repository.new("ann/new"))
    answer = fresh.worker.run("push", str(pushed_run), "--repo", "ann/old")
    assert answer.code == 4
    assert "ann/old" in answer.output
    assert f"{fresh.hub.endpoint}/ann/new" in answer.output


def test_a_fine_grained_token_pushes_and_a_public_repository_is_reported(fresh, pushed_run):
    answer = fresh.worker.run("push", str(pushed_run), "--repo", "ann/open", "--public", token=WIDE)
    assert answer.code == 0, answer.output
    assert "(public)" in answer.output
    assert not fresh.store.model("ann/open").private
    answer = fresh.worker.run("push", str(pushed_run), "--repo", "ann/open")
    (warning,) = [line for line in answer.output.splitlines() if line.startswith("warning: ")]
    assert f"{fresh.hub.endpoint}/ann/open" in warning
    assert "public" in warning


class Refusing(Faults):
    """Refuses every request whose path ends with `ending`."""

    def __init__(self, ending):
        super().__init__()
        self.ending = ending

    def of(self, request):
        super().of(request)
        return 403 if request.endswith(self.ending) else None


def test_a_push_that_fails_after_training_loses_nothing(fresh):
    recipe = write_recipe(fresh.folder, "./base", name="late")
    fresh.hub.faults = Refusing("/commit/main")
    answer = fresh.worker.run(
        "train",
        str(recipe),
        f"model.path={BASE}",
        "output.push_to_hub=we/late",
        "output.hub_private=false",
        *("train.steps=1", "sample.prompts=[]"),
    )
    run = fresh.folder / "late"
    assert answer.code == 4, answer.output
    assert f"halfbyte push {run}" in answer.output
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert len(fresh.store.model("we/late").commits) == 1
    fresh.hub.faults = Faults()
    answer = fresh.worker.run("push", str(run))
    assert answer.code == 0, answer.output
    repository = fresh.store.model("we/late")
    assert len(repository.commits) == 2
    assert not repository.private
    assert "pytorch_lora_weights.safetensors" in repository.tree
