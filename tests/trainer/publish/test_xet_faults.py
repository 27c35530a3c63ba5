"""Xet storage out of reach, for the real client of it: told once with exit code 4, and nothing half is left.

That storage's own protocol, of chunks in packed binary files, is not served here: what goes right is not seen.
"""

import re

import pytest

from hub_faults import Faults, Matching
from hub_runs import BASE, TOKEN
from push_worker import PushWorker

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def worker(hub, pushed_run, tmp_path):
    """With a cache of its own."""
    hub.hub.faults, hub.hub.xet = Faults(), NOWHERE
    with PushWorker(hub.hub.endpoint, tmp_path / "home", TOKEN, xet=True) as own:
        yield own
    hub.hub.faults, hub.hub.xet = Faults(), None


def draw(worker, tmp_path):
    drawn = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64")
    return worker.run("sample", BASE, *drawn, "--output", str(tmp_path / "drawn"))


def test_a_download_is_told_once_and_succeeds_without_xet(hub, worker, tmp_path):
    answer = draw(worker, tmp_path)
    assert answer.code == 4, answer.output
    (told,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
    assert told.startswith(f"downloading {BASE}: the transfer failed: ")
    assert "set HF_HUB_DISABLE_XET=1" in told
    assert "CRASHED" not in answer.output
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    assert not list((tmp_path / "home" / "hub").rglob("*.safetensors"))
    hub.hub.xet = None
    # The client keeps what it knew of the commit's files, of which none was of Xet.
    with PushWorker(hub.hub.endpoint, tmp_path / "home", TOKEN) as plain:
        answer = draw(plain, tmp_path)
    assert answer.code == 0, answer.output


@pytest.mark.parametrize("outcome", ["drop", 403])
def test_a_refused_pass_to_the_storage_is_told_as_the_hubs(hub, worker, tmp_path, outcome):
    hub.hub.faults = Matching(outcome, again=True, pattern="xet-read-token")
    answer = draw(worker, tmp_path)
    assert hub.hub.faults.met
    assert answer.code == 4, answer.output
    (told,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
    assert told.startswith(f"downloading {BASE}: ")
    assert ("no answer" if outcome == "drop" else f"the Hub answered {outcome}") in told


@pytest.mark.parametrize("outcome", [None, 401])
def test_an_upload_is_told_once_and_a_repeat_arrives(hub, worker, pushed_run, outcome):
    hub.store.repositories.pop(("model", "ann/xet"), None)
    if outcome is not None:
        hub.hub.faults = Matching(outcome, again=True, pattern="xet-write-token")
    answer = worker.run("push", str(pushed_run), "--repo", "ann/xet")
    assert answer.code == 4, answer.output
    (told,) = re.findall("^error: (.*)", answer.output, re.MULTILINE)
    assert told.startswith("push: uploading to ann/xet: ")
    assert "CRASHED" not in answer.output
    assert TOKEN not in answer.output
    repository = hub.store.model("ann/xet")
    assert len(repository.commits) == 1, "nothing half"
    hub.hub.faults, hub.hub.xet = Faults(), None
    answer = hub.worker.run("push", str(pushed_run), "--repo", "ann/xet")
    assert answer.code == 0, answer.output
    assert "pytorch_lora_weights.safetensors" in repository.tree
