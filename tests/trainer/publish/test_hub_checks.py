"""What is wrong with a push is told before anything is loaded, with the page to open; a late fault loses nothing."""

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
    """The Hub with several accounts; nothing goes wrong by itself, and the worker's token is the first one's."""
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
    ("repository", "token", "told"),
    [
        ("ann/x", "", "not logged in to the Hub; make a token that may write at {tokens}"),
        (
            "ann/x",
            "hf_nobodyKnows",
            "the Hub answered 401; the token is not valid (any longer): see {tokens}",
        ),
        ("ann/x", "hf_bröken", "the token holds characters that no token has: see {tokens}"),
        ("ann/x", READER, "the token may only read; make one that may write at {tokens}"),
        ("ann/x", NARROW, "no right to write to repositories of ann; give it repo.write at {tokens}"),
        (
            "eve/x",
            TOKEN,
            "eve/x would belong to eve, and the token is ann's; expected an owner of ann, we, readers",
        ),
        ("readers/x", TOKEN, "ann may only read in the organization readers"),
    ],
)
def test_a_token_that_cannot_push_is_told_before_anything_is_loaded(fresh, repository, token, told):
    answer = start(fresh, repository, token)
    assert answer.code == 4, answer.output
    expected = told.format(tokens=settings_page(fresh), endpoint=fresh.hub.endpoint)
    assert expected in answer.output
    assert answer.output.count("error:") == 1
    assert not token or token not in answer.output
    assert not any(BASE in request for request in fresh.hub.faults.requests)
    assert not (fresh.folder / "never").exists()


def something_else(fresh):
    repository = Repository.new("ann/bert")
    repository.commit(repository.tree | {"pytorch_model.bin": Blob(b"theirs", large=True)})
    fresh.store.add(repository)


@pytest.mark.parametrize(
    "name", ["dog", "ann/dog.git", "ann/a--b", "./ann/dog", "https://huggingface.co/ann/dog", ""]
)
def test_a_name_that_is_none_is_told_with_its_line(write, name):
    recipe = write(SMALL.replace("dir: out", f"dir: out, push_to_hub: '{name}'"))
    (line,) = problems(recipe)
    assert line == f"recipe.yaml:3: output.push_to_hub: got '{name}', expected a Hub repository as owner/name"


@pytest.mark.parametrize(
    ("made", "repository", "told"),
    [
        (
            lambda f: f.store.add(Repository.new("ann/pictures", kind="dataset")),
            "ann/pictures",
            "is a dataset (",
        ),
        (lambda f: f.store.add(Repository.new("ann/demo", kind="space")), "ann/demo", "is a space ("),
        (
            something_else,
            "ann/bert",
            "holds something else (pytorch_model.bin), which a push would overwrite",
        ),
    ],
)
def test_a_repository_that_is_something_else_is_told_and_kept(fresh, pushed_run, made, repository, told):
    made(fresh)
    kept = {key: list(one.commits) for key, one in fresh.store.repositories.items()}
    answer = start(fresh, repository)
    assert answer.code == 4, answer.output
    assert told in answer.output
    assert f"{fresh.hub.endpoint}/" in answer.output
    answer = fresh.worker.run("push", str(pushed_run), "--repo", repository)
    assert answer.code == 4, answer.output
    assert told in answer.output
    assert {key: one.commits for key, one in fresh.store.repositories.items()} == kept


def test_the_hub_itself_is_asked_whether_one_may_write(fresh):
    """A contributor to an organization may make repositories, and not write to others' there."""
    repository = fresh.store.add(Repository.new("we/theirs"))
    fresh.hub.faults = Refusing("/auth-check/write")
    answer = start(fresh, "we/theirs", GUEST)
    assert answer.code == 4, answer.output
    assert "whether we/theirs may be written to: the Hub answered 403" in answer.output
    assert settings_page(fresh) in answer.output
    assert len(repository.commits) == 1


def test_a_renamed_repository_is_told(fresh, pushed_run):
    fresh.store.repositories["model", "ann/old"] = fresh.store.add(Repository.new("ann/new"))
    answer = fresh.worker.run("push", str(pushed_run), "--repo", "ann/old")
    assert answer.code == 4
    assert f"ann/old is now called ann/new; push to that name: {fresh.hub.endpoint}/ann/new" in answer.output


def test_a_fine_grained_token_pushes_and_public_is_said(fresh, pushed_run):
    answer = fresh.worker.run("push", str(pushed_run), "--repo", "ann/open", "--public", token=WIDE)
    assert answer.code == 0, answer.output
    assert "(public)" in answer.output
    assert not fresh.store.model("ann/open").private
    answer = fresh.worker.run("push", str(pushed_run), "--repo", "ann/open")
    assert "warning:" in answer.output
    assert "is there and public, and stays so" in answer.output


class Refusing(Faults):
    """Every request whose path ends so is refused."""

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
    assert f"The run is finished and whole in {run}; push it again: halfbyte push {run}" in answer.output
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert len(fresh.store.model("we/late").commits) == 1
    fresh.hub.faults = Faults()
    answer = fresh.worker.run("push", str(run))
    assert answer.code == 0, answer.output
    repository = fresh.store.model("we/late")
    assert len(repository.commits) == 2
    assert not repository.private
    assert "pytorch_lora_weights.safetensors" in repository.tree
