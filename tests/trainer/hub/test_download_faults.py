"""Tests downloads of a base in which each request fails in turn: retried or reported once, with an intact cache."""

import re
import shutil

import pytest

from hub_faults import Faults, Matching
from hub_runs import BASE, TOKEN, hub_with_base
from hub_store import Blob

OUTCOMES = ("drop", "page", "cut", 401, 403, 404, 429, 503)
TEMPORARY = ("drop", "page", "cut", 429, 503)
# The facts that the message of each failure must contain.
MESSAGES = {
    "drop": r"downloading {base}: .*{endpoint} \(RemoteProtocolError\); check the connection",
    "cut": r"downloading {base}: .*{endpoint} \(RemoteProtocolError\); check the connection",
    "page": r"downloading {base}: .*\b502\b.*https://status\.huggingface\.co",
    401: r"downloading {base}: .*\b401\b.*\btoken\b.*{endpoint}/settings/tokens",
    403: r"downloading {base}: .*\b403\b.*\bread\b.*{endpoint}/settings/tokens",
    404: r"downloading {base}: .*\b404\b.*\bread\b.*{endpoint}/{base}",
    429: r"downloading {base}: .*\b429\b.*too many requests",
    503: r"downloading {base}: .*\b503\b.*https://status\.huggingface\.co",
}


# One request of each kind, in the order in which a download makes them.
PLACES = (
    "GET .*/revision/main$",
    "GET .*/tree/",
    "HEAD .*/config.json$",
    "GET .*/config.json$",
    "HEAD .*safetensors$",
    "GET .*safetensors$",
)


class Downloads:
    """Downloads one base, by the command that generates an image with it, into a cache that is empty each time.

    Most downloads end before the base is loaded: `check_cache` compares its files with those of the Hub.
    """

    def __init__(self, to):
        self.to = to
        self.count = 0

    def fresh(self, faults, *, whole=False):
        shutil.rmtree(self.to.folder / "home" / "hub", ignore_errors=True)
        # The client remembers the files of a commit while its process lives, so make a new commit.
        repository = self.to.store.model(BASE)
        card = Blob(f"---\nlicense: mit\n---\n{len(repository.commits)}".encode(), large=False)
        repository.commit(repository.tree | {"README.md": card})
        return self.again(faults, whole=whole)

    def check_cache(self, *, complete):
        """Checks that every file in the cache is complete, and if `complete` that each file of the base is there."""
        folder = self.to.folder / "home" / "hub"
        assert not list(folder.rglob("*.incomplete"))
        tree = self.to.store.model(BASE).tree
        wanted = {name for name in tree if name.endswith((".json", ".safetensors", ".model"))}
        for snapshot in folder.glob("*/snapshots/*"):
            files = {
                file.relative_to(snapshot).as_posix(): file for file in snapshot.rglob("*") if file.is_file()
            }
            for name, file in files.items():
                assert file.read_bytes() == tree[name].content
            assert not complete or files.keys() >= wanted

    def again(self, faults, *, whole=False):
        self.to.hub.faults = faults
        self.count += 1
        options = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64")
        folders = (
            "--cache",
            str(self.to.folder / "cache"),
            "--output",
            str(self.to.folder / f"images{self.count}"),
        )
        until = None if whole else "halfbyte.trainer.sample.run._draw"
        answer = self.to.worker.run("sample", BASE, *options, *folders, until=until)
        self.check_cache(complete=answer.code == 0)
        return answer


@pytest.fixture(scope="module")
def downloads(tmp_path_factory, mini_flux):
    with hub_with_base(tmp_path_factory.mktemp("downloads"), mini_flux) as to:
        yield Downloads(to)


def weights(faults):
    return [request for request in faults.requests if re.match("GET .*safetensors$", request)]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_failure_at_any_request_is_reported_once_and_a_repeat_succeeds(downloads, outcome):
    # A HEAD response has no body to cut, and a cut file is resumed, which a test below covers.
    for place in PLACES[:2] if outcome == "cut" else PLACES:
        faults = Matching(outcome, again=True, pattern=place)
        answer = downloads.fresh(faults)
        where = f"{outcome} at {faults.met}: {answer.output}"
        assert answer.code == 4, where
        (message,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
        expected = MESSAGES[outcome].format(base=BASE, endpoint=downloads.to.hub.endpoint)
        assert re.search(expected, message), where
        assert "CRASHED" not in answer.output, where
        assert TOKEN not in answer.output, where
    answer = downloads.again(Faults(), whole=outcome == "drop")
    assert answer.code == 0, f"after {where}, then {answer.output}"


@pytest.mark.parametrize("outcome", TEMPORARY)
def test_a_temporary_failure_is_retried(downloads, outcome):
    for place in PLACES if outcome == "drop" else (PLACES[0], PLACES[-1]):
        faults = Matching(outcome, pattern=place)
        answer = downloads.fresh(faults)
        assert faults.met, place
        assert answer.code == 0, f"{outcome} at {faults.met}: {answer.output}"


def test_a_file_that_is_cut_repeatedly_resumes_where_it_was_cut(downloads):
    faults = Matching("cut", again=True, pattern="GET .*/transformer/.*safetensors$")
    answer = downloads.fresh(faults)
    assert answer.code == 4, answer.output
    assert "RemoteProtocolError" in answer.output
    # Each request halves the rest, down to the last byte.
    assert faults.requests.count(faults.met) > 10
    assert downloads.again(Faults()).code == 0


def test_a_stalled_connection_is_dropped(downloads):
    answer = downloads.fresh(Matching("stall", pattern="revision/main"))
    assert answer.code == 0, answer.output
    assert answer.waits == [1.0]


def test_finished_files_are_not_fetched_again_after_a_failure(downloads):
    faults = Faults()
    assert downloads.fresh(faults).code == 0
    count = len(weights(faults))
    faults = Matching(403, pattern="GET .*/transformer/.*safetensors$")
    assert downloads.fresh(faults).code == 4
    first = set(weights(faults)) - {faults.met}
    faults = Faults()
    assert downloads.again(faults).code == 0
    assert not first & set(weights(faults))
    assert len(first) + len(weights(faults)) == count


def test_a_complete_cache_is_used_while_the_hub_fails(downloads):
    assert downloads.fresh(Faults()).code == 0
    for outcome in (403, 429, 503):
        answer = downloads.again(Matching(outcome, again=True, pattern="revision/main"), whole=outcome == 503)
        assert answer.code == 0, answer.output
