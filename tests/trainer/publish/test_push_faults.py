"""Pushes in which a request goes wrong, each in turn and in every way: told once, nothing half, and repeatable."""

import re
import shutil

import pytest

from hub_faults import Faults
from hub_runs import TOKEN

REPOSITORY = "ann/fault"
OUTCOMES = ("drop", "lose", "page", 401, 403, 404, 409, 429, 503)
PASSING = ("drop", "lose", "page", 429, 503)


@pytest.fixture(scope="module")
def run(pushed_run, tmp_path_factory):
    """A copy with few files, so that a push is few requests."""
    copy = shutil.copytree(pushed_run, tmp_path_factory.mktemp("faults") / "dog")
    for name in ("samples", "adapter/comfyui", "adapter/kohya"):
        shutil.rmtree(copy / name)
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    return copy


class Pushes:
    """Pushes of one run to a repository that is new each time."""

    def __init__(self, hub, run):
        self.hub, self.run = hub, run
        self.answer = self.fresh(Faults())
        assert self.answer.code == 0, self.answer.output
        self.tree = dict(self.repository.tree)
        self.requests = list(hub.hub.faults.requests)

    @property
    def repository(self):
        return self.hub.store.repositories.get(("model", REPOSITORY))

    def fresh(self, faults):
        self.hub.store.repositories.pop(("model", REPOSITORY), None)
        self.hub.store.large.clear()
        return self.again(faults)

    def again(self, faults):
        self.hub.hub.faults = faults
        return self.hub.worker.run("push", str(self.run), "--repo", REPOSITORY)

    def places(self):
        """The requests, one of each kind: uploads differ by nothing but their content."""
        kinds = {}
        for number, request in enumerate(self.requests):
            kinds.setdefault(re.sub(r"[0-9a-f]{40,64}", "*", request), number)
        # The repository is looked at before it is made and afterwards.
        looks = [n for n, request in enumerate(self.requests) if request == f"GET /api/models/{REPOSITORY}"]
        return sorted({*kinds.values(), *looks})


@pytest.fixture(scope="module")
def pushes(hub, run):
    before = hub.hub.faults
    yield Pushes(hub, run)
    hub.hub.faults = before


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_asks_what_the_tests_expect(pushes):
    assert [pushes.requests[place].split("/")[-1] for place in pushes.places()][:5] == [
        "whoami-v2",
        "fault",
        "fault",
        "fault",
        "create",
    ]
    assert len(pushes.places()) == 12
    assert len(pushes.repository.commits) == 2


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_whatever_goes_wrong_is_told_once_and_a_repeat_arrives_at_the_same(pushes, outcome):
    local = files(pushes.run)
    for place in pushes.places():
        request = pushes.requests[place]
        answer = pushes.fresh(Faults(outcome, place, again=True))
        where = f"{outcome} at {request}: {answer.output}"
        assert answer.code == 4, where
        assert len(re.findall("^error: push: ", answer.output, re.MULTILINE)) == 1, where
        assert "CRASHED" not in answer.output, where
        assert "Traceback" not in answer.output, where
        assert TOKEN not in answer.output, where
        done = outcome == "lose" and request.endswith("/commit/main")
        if pushes.repository is not None:
            # Either nothing of ours, or all of it.
            assert len(pushes.repository.commits) == (2 if done else 1), where
        answer = pushes.again(Faults())
        assert answer.code == 0, f"after {where}, then {answer.output}"
        assert pushes.repository.tree == pushes.tree
        assert len(pushes.repository.commits) == 2
    assert files(pushes.run) == local


@pytest.mark.parametrize("outcome", PASSING)
def test_what_passes_is_waited_for(pushes, outcome):
    for place in pushes.places():
        answer = pushes.fresh(Faults(outcome, place, headers={"Retry-After": "7"} if outcome == 429 else {}))
        where = f"{outcome} at {pushes.requests[place]}: {answer.output}"
        assert answer.code == 0, where
        assert pushes.repository.tree == pushes.tree, where
        assert len(pushes.repository.commits) == 2, where
        assert answer.waits == [8.0 if outcome == 429 else 1.0], where


def test_a_connection_that_stalls_is_given_up(pushes):
    for place in (0, len(pushes.requests) - 1):
        answer = pushes.fresh(Faults("stall", place))
        assert (answer.code, answer.waits) == (0, [1.0]), answer.output
        assert "(ReadTimeout); again in 1 s" in answer.output
        assert pushes.repository.tree == pushes.tree


@pytest.mark.parametrize(("header", "value"), [("Retry-After", "7200"), ("RateLimit", '"api";r=0;t=7200')])
def test_a_long_ban_is_told_instead_of_waited_for(pushes, header, value):
    (place,) = [n for n, request in enumerate(pushes.requests) if request.endswith("/commit/main")]
    answer = pushes.fresh(Faults(429, place, headers={header: value}))
    assert (answer.code, answer.waits) == (4, [])
    assert "try again in 120 minutes" in answer.output


def test_a_storage_that_refuses_is_no_matter_of_rights(pushes):
    (place, *_) = [n for n, request in enumerate(pushes.requests) if request.startswith("PUT")]
    answer = pushes.fresh(Faults(403, place))
    assert answer.code == 4
    assert "the Hub answered 403" in answer.output
    assert "push again, and what is uploaded already is not sent twice" in answer.output
    assert "the right to write" not in answer.output


def test_an_interrupted_push_sends_no_large_file_twice(pushes):
    (place,) = [n for n, request in enumerate(pushes.requests) if request.endswith("/commit/main")]
    assert pushes.fresh(Faults(403, place)).code == 4
    faults = Faults()
    assert pushes.again(faults).code == 0
    assert not [request for request in faults.requests if request.startswith("PUT")]


class Meanwhile(Faults):
    """Somebody commits just before the push does."""

    def __init__(self, repository):
        super().__init__()
        self.repository = repository

    def of(self, request):
        if request.endswith("/commit/main") and request not in self.requests:
            tree = self.repository.tree
            self.repository.commit(tree | {"theirs.txt": next(iter(tree.values()))})
        return super().of(request)


def test_somebody_elses_commit_in_between_is_not_overwritten(pushes):
    assert pushes.fresh(Faults()).code == 0
    repository = pushes.repository
    repository.commit({name: blob for name, blob in repository.tree.items() if name != "README.md"})
    answer = pushes.again(Meanwhile(repository))
    assert answer.code == 4, answer.output
    assert "changed it at the same time" in answer.output
    assert "README.md" not in repository.tree
    assert pushes.again(Faults()).code == 0
    assert repository.tree == pushes.tree | {"theirs.txt": repository.tree["theirs.txt"]}


def test_the_token_is_nowhere(pushes, hub):
    assert hub.hub.leaks == []
    assert TOKEN not in hub.worker.stderr.read_text()
    for file in hub.folder.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    # Nor the signatures of addresses for uploads, in what was told of failures.
    assert "X-Signature" not in pushes.fresh(Faults(503, 8, again=True)).output
