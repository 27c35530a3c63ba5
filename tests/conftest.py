"""Tiny pipelines on disk, made once for the whole test run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

# Before huggingface_hub is imported by anything: no test may reach a network.
os.environ["HF_HUB_OFFLINE"] = "1"

from scripts.mini.tiny_pipelines import build_flux_pipeline, build_sd3_pipeline

from small_recipe import Write

# At these sizes a second thread gains nothing, and sums in another order would unpin the pinned losses.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The mark `gpu` is for tests that need a CUDA device; scripts/dev/test_gpu runs those alone."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def mini_flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "flux"
    build_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mini_sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "sd3"
    build_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_package(tmp_path_factory, mini_flux):
    """Both parts in NF4 by stock bitsandbytes; and a T5 in int8 in a folder of its own."""
    # Slow to import, and most tests do without.
    from packages import write_package, write_t5

    folder = tmp_path_factory.mktemp("package")
    write_package(mini_flux, folder / "both", transformer="nf4", t5="nf4")
    write_t5(mini_flux / "text_encoder_2", folder / "t5", "int8")
    return folder


@pytest.fixture(scope="session")
def bare_flux(tmp_path_factory, mini_flux):
    """The pipeline without the transformer's weights, and without T5."""
    folder = tmp_path_factory.mktemp("bare") / "flux"
    shutil.copytree(mini_flux, folder, ignore=shutil.ignore_patterns("text_encoder_2"))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory, mini_flux):
    # Slow to import, and most tests do without.
    from hub_runs import hub_with_base

    with hub_with_base(tmp_path_factory.mktemp("hub"), mini_flux) as to:
        yield to


@pytest.fixture(scope="session")
def pushed_run(hub):
    """A run that has pushed itself to ann/dog when it was done."""
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
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes recipe.yaml beside a folder of pictures; the current folder is another one."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def written(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written
