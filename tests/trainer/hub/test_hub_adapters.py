"""Tests using a pushed adapter by its name: generating images with it, and starting a run from it."""

import json

import pytest
from PIL import Image
from safetensors.numpy import load_file

from hub_faults import Faults
from hub_runs import BASE, train
from hub_store import Blob, Repository
from runs import write_recipe

ADAPTER = "pytorch_lora_weights.safetensors"
QUICK = ("sample.prompts=[]", "output.export_base=false", "train.steps=1", "train.grad_accumulation=1")


@pytest.fixture
def calm(hub, pushed_run):
    hub.hub.faults = Faults()
    return hub


def sample(hub, source, output, *options):
    image = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64")
    return hub.worker.run("sample", source, *image, "--output", str(output), *options)


def parts(hub, name, *files):
    """Adds a repository with some of the files of the pushed one."""
    tree = hub.store.model("ann/dog").tree
    repository = hub.store.add(Repository.new(name))
    repository.commit(repository.tree | {file: tree[file] for file in files})
    return repository


@pytest.mark.parametrize("file", [ADAPTER, "adapter_model.safetensors"])
def test_images_with_an_adapter_from_the_hub_match_the_runs(calm, pushed_run, tmp_path, file):
    repository = parts(calm, f"ann/of-{file.partition('.')[0]}", file, "adapter_config.json", "README.md")
    answer = sample(calm, repository.name, tmp_path / "hub")
    assert answer.code == 0, answer.output
    (record, *_) = json.loads((tmp_path / "hub" / "pictures.json").read_text())
    assert record["adapter"]["name"] == f"{repository.name} at {repository.head}"
    local = sample(calm, str(pushed_run / "adapter" / file), tmp_path / "local")
    assert local.code == 0, local.output
    one, other = (Image.open(next((tmp_path / kind).glob("*.png"))) for kind in ("hub", "local"))
    assert one.tobytes() == other.tobytes()


def test_only_the_adapter_is_fetched_also_at_an_older_commit(calm, tmp_path):
    repository = calm.store.model("ann/dog")
    old = repository.head
    repository.commit(repository.tree | {ADAPTER: Blob(b"broken", large=True)})
    try:
        calm.hub.faults = faults = Faults()
        answer = sample(calm, "ann/dog", tmp_path / "old", "--revision", old)
        assert answer.code == 0, answer.output
        fetched = {
            request.split("/")[-1] for request in faults.requests if request.startswith("GET /ann/dog/")
        }
        assert fetched == {"README.md", ADAPTER, "adapter_config.json"}
        answer = sample(calm, f"ann/dog@{old}", tmp_path / "at")
        assert answer.code == 0, answer.output
        images = [next((tmp_path / kind).glob("prompt*.png")) for kind in ("old", "at")]
        assert Image.open(images[0]).tobytes() == Image.open(images[1]).tobytes()
        answer = sample(calm, f"ann/dog@{old}", tmp_path / "twice", "--revision", "main")
        assert (answer.code, "--revision" in answer.output) == (2, True), answer.output
        answer = sample(calm, "ann/dog", tmp_path / "new")
        assert (answer.code, ADAPTER in answer.output) == (2, True), answer.output
    finally:
        repository.commits.pop()


def test_a_run_starts_from_an_adapter_on_the_hub(calm, pushed_run):
    run = train(calm, *QUICK, "lora.init_from=ann/dog", "optimizer.lr=1e-9", name="again")
    one, other = (load_file(folder / "adapter" / ADAPTER) for folder in (pushed_run, run))
    assert all(abs(one[name] - other[name]).max() < 1e-6 for name in one)
    assert any(abs(tensor).max() > 1e-3 for name, tensor in other.items() if ".lora_B." in name)


def test_a_repository_without_an_adapter_or_that_does_not_exist_is_rejected(calm, tmp_path):
    parts(calm, "ann/empty", "README.md", "kohya/dog.safetensors")
    recipe = str(write_recipe(calm.folder, "./base", name="from"))
    for source, code, facts in (
        ("ann/empty", 2, ("ann/empty", "model_index.json", "adapter")),
        ("ann/nothing", 4, ("ann/nothing", "hf auth login")),
    ):
        answer = sample(calm, source, tmp_path / "none")
        assert answer.code == code, answer.output
        assert all(fact in answer.output for fact in facts), answer.output
        calm.hub.faults = faults = Faults()
        answer = calm.worker.run("train", recipe, f"model.path={BASE}", f"lora.init_from={source}")
        assert answer.code == code, answer.output
        assert all(fact in answer.output for fact in facts), answer.output
        assert not [request for request in faults.requests if BASE in request], "before the base is opened"


def test_a_killed_run_gives_its_newest_checkpoint_else_its_adapter(calm, tmp_path):
    run = train(calm, *QUICK, "optimizer.lr=0.02", name="killed")
    (run / "adapter").rename(run / "elsewhere")
    again = train(calm, *QUICK, f"lora.init_from={run}", "optimizer.lr=1e-9", name="started")
    one, other = (load_file(file / ADAPTER) for file in (run / "elsewhere", again / "adapter"))
    assert all(abs(one[name] - other[name]).max() < 1e-6 for name in one)
    (run / "elsewhere").rename(run / "adapter")
    (run / "checkpoints").rename(run / "gone")
    answer = sample(calm, str(run), tmp_path / "images")
    assert answer.code == 0, answer.output
    answer = sample(calm, str(run), tmp_path / "images2", "--checkpoint", "1")
    assert (answer.code, "no checkpoint" in answer.output) == (2, True), answer.output
