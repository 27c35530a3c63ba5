"""Downloads of a base in which a request goes wrong, each in turn: waited for or told once, and the cache is whole."""

import re
import shutil

import pytest

from hub_faults import Faults, Matching
from hub_runs import BASE, TOKEN, hub_with_base
from hub_store import Blob

OUTCOMES = ("drop", "page", "cut", 401, 403, 404, 429, 503)
PASSING = ("drop", "page", "cut", 429, 503)
SAID = {
    "drop": r"downloading {base}: no answer from {endpoint} \(RemoteProtocolError\); check the connection",
    "cut": r"downloading {base}: no answer from {endpoint} \(RemoteProtocolError\); check the connection",
    "page": r"downloading {base}: the Hub answered 502; trouble at the Hub",
    401: r"downloading {base}: the Hub answered 401 .*the token is not valid .*{endpoint}/settings/tokens",
    403: r"downloading {base}: the Hub answered 403 .*the right to read there at {endpoint}/settings/tokens",
    404: r"downloading {base}: the Hub answered 404 .*and yours to read: {endpoint}/{base}",
    429: r"downloading {base}: the Hub answered 429 .*too many requests: try again later",
    503: r"downloading {base}: the Hub answered 503 .*trouble at the Hub",
}


# One of each kind, in the order in which a download comes to them.
PLACES = (
    "GET .*/revision/main$",
    "GET .*/tree/",
    "HEAD .*/config.json$",
    "GET .*/config.json$",
    "HEAD .*safetensors$",
    "GET .*safetensors$",
)


class Downloads:
    """Downloads of one base into a cache that is empty each time, for a picture of it."""

    def __init__(self, to):
        self.to = to
        self.count = 0

    def fresh(self, faults):
        shutil.rmtree(self.to.folder / "home" / "hub", ignore_errors=True)
        # The client remembers what a commit holds as long as its process lives.
        repository = self.to.store.model(BASE)
        card = Blob(f"---\nlicense: mit\n---\n{len(repository.commits)}".encode(), large=False)
        repository.commit(repository.tree | {"README.md": card})
        return self.again(faults)

    def check_cache(self):
        """Whatever is there is whole."""
        folder = self.to.folder / "home" / "hub"
        assert not list(folder.rglob("*.incomplete"))
        tree = self.to.store.model(BASE).tree
        for snapshot in folder.glob("*/snapshots/*"):
            for file in (path for path in snapshot.rglob("*") if path.is_file()):
                assert file.read_bytes() == tree[file.relative_to(snapshot).as_posix()].content

    def again(self, faults):
        self.to.hub.faults = faults
        self.count += 1
        drawn = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64")
        folders = (
            "--cache",
            str(self.to.folder / "cache"),
            "--output",
            str(self.to.folder / f"drawn{self.count}"),
        )
        return self.to.worker.run("sample", BASE, *drawn, *folders)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory, mini_flux):
    with hub_with_base(tmp_path_factory.mktemp("downloads"), mini_flux) as to:
        yield Downloads(to)


def weights(faults):
    return [request for request in faults.requests if re.match("GET .*safetensors$", request)]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_goes_wrong_at_each_request_is_told_once_and_a_repeat_succeeds(downloads, outcome):
    # A HEAD has no body to cut; and a file goes on where it was cut, see below.
    for place in PLACES[:2] if outcome == "cut" else PLACES:
        faults = Matching(outcome, again=True, pattern=place)
        answer = downloads.fresh(faults)
        where = f"{outcome} at {faults.met}: {answer.output}"
        assert answer.code == 4, where
        (told,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
        said = SAID[outcome].format(base=BASE, endpoint=downloads.to.hub.endpoint)
        assert re.search(said, told), where
        assert "CRASHED" not in answer.output, where
        assert TOKEN not in answer.output, where
        downloads.check_cache()
    answer = downloads.again(Faults())
    assert answer.code == 0, f"after {where}, then {answer.output}"


@pytest.mark.parametrize("outcome", PASSING)
def test_what_passes_is_waited_for(downloads, outcome):
    for place in PLACES if outcome == "drop" else (PLACES[0], PLACES[-1]):
        faults = Matching(outcome, pattern=place)
        answer = downloads.fresh(faults)
        assert faults.met, place
        assert answer.code == 0, f"{outcome} at {faults.met}: {answer.output}"


def test_a_file_that_is_cut_again_and_again_goes_on_where_it_was_cut(downloads):
    faults = Matching("cut", again=True, pattern="GET .*/transformer/.*safetensors$")
    answer = downloads.fresh(faults)
    assert answer.code == 4, answer.output
    assert "no answer from" in answer.output
    # By halves, to the last byte.
    assert faults.requests.count(faults.met) > 10
    assert downloads.again(Faults()).code == 0


def test_a_stalled_connection_is_given_up(downloads):
    answer = downloads.fresh(Matching("stall", pattern="revision/main"))
    assert answer.code == 0, answer.output
    assert answer.waits == [1.0]


def test_what_is_there_is_not_fetched_again_after_a_fault(downloads):
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


def test_a_whole_cache_serves_while_the_hub_does_not(downloads):
    assert downloads.fresh(Faults()).code == 0
    for outcome in (403, 429, 503):
        answer = downloads.again(Matching(outcome, again=True, pattern="revision/main"))
        assert answer.code == 0, answer.output
