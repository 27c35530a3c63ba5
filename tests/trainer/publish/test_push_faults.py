"""Tests pushes in which each request fails in turn: reported once, no partial commit, and a repeat succeeds."""

import re
import shutil

import pytest

from hub_faults import Faults
from hub_runs import TOKEN

REPOSITORY = "ann/fault"
OUTCOMES = ("drop", "lose", "page", 401, 403, 404, 409, 429, 503)
TEMPORARY = ("drop", "lose", "page", 429, 503)


@pytest.fixture(scope="module")
def run(pushed_run, tmp_path_factory):
    """A copy of the run with few files, so that a push needs few requests."""
    copy = shutil.copytree(pushed_run, tmp_path_factory.mktemp("faults") / "dog")
    for name in ("samples", "adapter/comfyui", "adapter/kohya"):
        shutil.rmtree(copy / name)
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    return copy


class Pushes:
    """Pushes one run to a repository that is new each time."""

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
        """Returns the positions of one request of each kind. Uploads differ only in their content."""
        kinds = {}
        for number, request in enumerate(self.requests):
            kinds.setdefault(re.sub(r"[0-9a-f]{40,64}", "*", request), number)
        # The repository is read before and after it is created.
        looks = [n for n, request in enumerate(self.requests) if request == f"GET /api/models/{REPOSITORY}"]
        return sorted({*kinds.values(), *looks})


@pytest.fixture(scope="module")
def pushes(hub, run):
    before = hub.hub.faults
    yield Pushes(hub, run)
    hub.hub.faults = before


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_push_makes_the_expected_requests(pushes):
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
def test_any_failure_is_reported_once_and_a_repeat_gives_the_same_result(pushes, outcome):
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
            # The repository has either none of our files or all of them.
            assert len(pushes.repository.commits) == (2 if done else 1), where
        answer = pushes.again(Faults())
        assert answer.code == 0, f"after {where}, then {answer.output}"
        assert pushes.repository.tree == pushes.tree
        assert len(pushes.repository.commits) == 2
    assert files(pushes.run) == local


@pytest.mark.parametrize("outcome", TEMPORARY)
def test_a_temporary_failure_is_retried(pushes, outcome):
    for place in pushes.places():
        answer = pushes.fresh(Faults(outcome, place, headers={"Retry-After": "7"} if outcome == 429 else {}))
        where = f"{outcome} at {pushes.requests[place]}: {answer.output}"
        assert answer.code == 0, where
        assert pushes.repository.tree == pushes.tree, where
        assert len(pushes.repository.commits) == 2, where
        assert answer.waits == [8.0 if outcome == 429 else 1.0], where


def test_a_stalled_connection_is_dropped_and_retried(pushes):
    for place in (0, len(pushes.requests) - 1):
        answer = pushes.fresh(Faults("stall", place))
        assert (answer.code, answer.waits) == (0, [1.0]), answer.output
        assert re.search(r"\(ReadTimeout\).* 1 s", answer.output)
        assert pushes.repository.tree == pushes.tree


@pytest.mark.parametrize(("header", "value"), [("Retry-After", "7200"), ("RateLimit", '"api";r=0;t=7200')])
def test_a_long_rate_limit_is_reported_without_waiting(pushes, header, value):
    (place,) = [n for n, request in enumerate(pushes.requests) if request.endswith("/commit/main")]
    answer = pushes.fresh(Faults(429, place, headers={header: value}))
    assert (answer.code, answer.waits) == (4, [])
    assert "in 120 minutes" in answer.output


def test_a_refusal_by_file_storage_does_not_blame_the_token(pushes):
    (place, *_) = [n for n, request in enumerate(pushes.requests) if request.startswith("PUT")]
    answer = pushes.fresh(Faults(403, place))
    assert answer.code == 4
    assert "403" in answer.output
    assert "push again" in answer.output
    assert "/settings/tokens" not in answer.output


def test_an_interrupted_push_sends_no_large_file_twice(pushes):
    (place,) = [n for n, request in enumerate(pushes.requests) if request.endswith("/commit/main")]
    assert pushes.fresh(Faults(403, place)).code == 4
    faults = Faults()
    assert pushes.again(faults).code == 0
    assert not [request for request in faults.requests if request.startswith("PUT")]


class Meanwhile(Faults):
    """Somebody else commits just before the push does."""

    def __init__(self, repository):
        super().__init__()
        self.repository = repository

    def of(self, request):
        if request.endswith("/commit/main") and request not in self.requests:
            tree = self.repository.tree
            self.repository.commit(tree | {"theirs.txt": next(iter(tree.values()))})
        return super().of(request)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(pushes):
    assert pushes.fresh(Faults()).code == 0
    repository = pushes.repository
    repository.commit({name: blob for name, blob in repository.tree.items() if name != "README.md"})
    answer = pushes.again(Meanwhile(repository))
    assert answer.code == 4, answer.output
    assert "at the same time" in answer.output
    assert "README.md" not in repository.tree
    assert pushes.again(Faults()).code == 0
    assert repository.tree == pushes.tree | {"theirs.txt": repository.tree["theirs.txt"]}


def test_the_token_appears_nowhere(pushes, hub):
    assert hub.hub.leaks == []
    assert TOKEN not in hub.worker.stderr.read_text()
    for file in hub.folder.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    # Messages about failures do not contain the signatures of upload URLs either.
    assert "X-Signature" not in pushes.fresh(Faults(503, 8, again=True)).output
