"""Tests unreachable Xet storage with its real client: one error, exit code 4, and no partial files.

The loopback Hub does not implement the Xet protocol, so successful Xet transfers are not tested.
"""

import re

import pytest

from hub_faults import Faults, Matching
from hub_runs import BASE, TOKEN
from push_worker import PushWorker

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("xet") / "home"


@pytest.fixture(scope="module")
def own_worker(hub, pushed_run, home):
    """A worker with a separate cache, which stays empty: no test of this file before the last downloads anything."""
    with PushWorker(hub.hub.endpoint, home, TOKEN, xet=True) as own:
        yield own


@pytest.fixture
def worker(hub, own_worker):
    hub.hub.faults, hub.hub.xet = Faults(), NOWHERE
    yield own_worker
    hub.hub.faults, hub.hub.xet = Faults(), None


def sample(run, tmp_path):
    options = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64")
    return run("sample", BASE, *options, "--output", str(tmp_path / "images"))


@pytest.mark.parametrize("outcome", ["drop", 403])
def test_a_refused_storage_token_is_reported_as_a_failure_of_the_hub(hub, worker, tmp_path, outcome):
    hub.hub.faults = Matching(outcome, again=True, pattern="xet-read-token")
    answer = sample(worker.run_forked, tmp_path)
    assert hub.hub.faults.met
    assert answer.code == 4, answer.output
    (message,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
    assert message.startswith(f"downloading {BASE}: ")
    assert (hub.hub.endpoint if outcome == "drop" else f"status {outcome}") in message


@pytest.mark.parametrize("outcome", [None, 401])
def test_a_failed_upload_is_reported_once_and_a_repeat_succeeds(hub, worker, pushed_run, outcome):
    hub.store.repositories.pop(("model", "ann/xet"), None)
    if outcome is not None:
        hub.hub.faults = Matching(outcome, again=True, pattern="xet-write-token")
    answer = worker.run_forked("push", str(pushed_run), "--repo", "ann/xet")
    assert answer.code == 4, answer.output
    (message,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
    assert message.startswith("push: uploading to ann/xet: ")
    assert "CRASHED" not in answer.output
    assert TOKEN not in answer.output
    repository = hub.store.model("ann/xet")
    assert len(repository.commits) == 1, "no partial commit"
    hub.hub.faults, hub.hub.xet = Faults(), None
    answer = hub.worker.run("push", str(pushed_run), "--repo", "ann/xet")
    assert answer.code == 0, answer.output
    assert "pytorch_lora_weights.safetensors" in repository.tree


def test_a_failed_download_is_reported_once_and_succeeds_without_xet(hub, worker, home, tmp_path):
    answer = sample(worker.run_forked, tmp_path)
    assert answer.code == 4, answer.output
    (message,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
    assert message.startswith(f"downloading {BASE}: the transfer failed: ")
    assert "HF_HUB_DISABLE_XET=1" in message
    assert "CRASHED" not in answer.output
    assert not list(home.rglob("*.incomplete"))
    assert not list((home / "hub").rglob("*.safetensors"))
    hub.hub.xet = None
    # The client cached the commit's file information, and none of it mentions Xet.
    with PushWorker(hub.hub.endpoint, home, TOKEN) as plain:
        answer = sample(plain.run, tmp_path)
    assert answer.code == 0, answer.output
