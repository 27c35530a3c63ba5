"""Settings of the whole test run, the list of slow tests, and fixtures that tests of many folders share."""

import gc
import json
import logging
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slow_tests import SLOW, slow_place

if TYPE_CHECKING:
    from small_recipe import Write

# Set before any library is imported. No test may reach a network, and a process that a test starts computes on one
# thread, as the tests do: two test processes would otherwise compete for the cores with four threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# Off until everything is imported, see pytest_collection_finish.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the slow tests, moves the slowest files to the front, and skips `gpu` tests where there is no device."""
    # torch is imported in functions only: the process that hands out the tests to others never needs it.
    import torch

    place = {item: slow_place(item.nodeid) for item in items}
    for item in items:
        if place[item] < len(SLOW):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    first: dict[str, int] = {}  # place of a file's slowest entry
    for item in items:
        file = item.nodeid.partition("::")[0]
        first[file] = min(first.get(file, len(SLOW)), place[item])
    items.sort(key=lambda item: first[item.nodeid.partition("::")[0]])


def pytest_collection_finish() -> None:
    """Exempts the imported libraries from garbage collection.

    A run collects garbage four times before and after training. Each time, Python would walk through the million
    objects of torch and diffusers, which took a third of the time of a short run.
    """
    import torch

    # At these sizes a second thread gains nothing, and another order of summation would change the pinned losses.
    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Keeps a copy of this process from before the first test, for tests that need other processes; see `nursery`.

    With a CUDA device there is none, because CUDA cannot be used in a forked process. Neither has the process that
    only hands out tests to others.
    """
    hands_out = getattr(session.config.option, "dist", "no") != "no" and not hasattr(
        session.config, "workerinput"
    )
    if hands_out or session.config.option.collectonly:
        return (yield)
    import torch

    import nursery

    if torch.cuda.is_available():
        return (yield)
    nursery.start()
    try:
        return (yield)
    finally:
        nursery.stop()


@pytest.fixture(scope="session", autouse=True)
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs the programs of the export's self-check in forks of one process that has imported stock diffusers.

    With a CUDA device they run as processes of their own, because CUDA cannot be used in a forked process.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    from fork_server import ForkServer

    with ForkServer(tmp_path_factory.mktemp("forks")):
        yield


@pytest.fixture(autouse=True)
def log_level() -> None:
    """Undoes the level of halfbyte's logger that a command in an earlier test has set for its process."""
    logging.getLogger("halfbyte").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def mini_flux(tmp_path_factory):
    """A FLUX pipeline with few blocks: the time of most tests is proportional to their number."""
    from scripts.mini.tiny_pipelines import build_flux_pipeline

    folder = tmp_path_factory.mktemp("mini") / "flux"
    build_flux_pipeline(dual=1, single=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mini_sd3(tmp_path_factory):
    from scripts.mini.tiny_pipelines import build_sd3_pipeline

    folder = tmp_path_factory.mktemp("mini") / "sd3"
    build_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_package(tmp_path_factory, mini_flux):
    """Holds `both`, transformer and T5 in NF4 by stock bitsandbytes, and `t5`, a T5 in int8."""
    # Imported here because it is slow to import and most tests do without it.
    from packages import write_package, write_t5

    folder = tmp_path_factory.mktemp("package")
    write_package(mini_flux, folder / "both", transformer="nf4", t5="nf4")
    write_t5(mini_flux / "text_encoder_2", folder / "t5", "int8")
    return folder


@pytest.fixture(scope="session")
def bare_flux(tmp_path_factory, mini_flux):
    """The pipeline without the transformer's weights and without T5."""
    folder = tmp_path_factory.mktemp("bare") / "flux"
    shutil.copytree(mini_flux, folder, ignore=shutil.ignore_patterns("text_encoder_2"))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory, mini_flux):
    # Imported here because it is slow to import and most tests do without it.
    from hub_runs import hub_with_base

    with hub_with_base(tmp_path_factory.mktemp("hub"), mini_flux) as to:
        yield to


@pytest.fixture(scope="session")
def pushed_run(hub):
    """A run that pushed itself to ann/dog when it was done."""
    from hub_runs import PROMPTS, train

    return train(
        hub,
        f"sample.prompts={json.dumps(PROMPTS)}",
        "data.caption_prefix=a pic of ",
        "optimizer.lr=0.02",
        "validation.held_out=2",
        "output.push_to_hub=ann/dog",
    )


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Write":
    """Writes recipe.yaml next to a folder of images; the current folder is another one."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def written(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts halfbyte's commands in forks of one process that has imported everything."""
    from run_server import RunServer

    with RunServer(tmp_path_factory.mktemp("commands")) as started:
        yield started
