"""What was pushed is used again by its name: pictures with the adapter, and a run that starts from it."""

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
    drawn = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64")
    return hub.worker.run("sample", source, *drawn, "--output", str(output), *options)


def parts(hub, name, *files):
    """A repository with some files of the one that was pushed."""
    tree = hub.store.model("ann/dog").tree
    made = hub.store.add(Repository.new(name))
    made.commit(made.tree | {file: tree[file] for file in files})
    return made


@pytest.mark.parametrize("file", [ADAPTER, "adapter_model.safetensors"])
def test_pictures_with_an_adapter_on_the_hub_are_those_with_the_run(calm, pushed_run, tmp_path, file):
    made = parts(calm, f"ann/of-{file.partition('.')[0]}", file, "adapter_config.json", "README.md")
    answer = sample(calm, made.name, tmp_path / "hub")
    assert answer.code == 0, answer.output
    (told, *_) = json.loads((tmp_path / "hub" / "pictures.json").read_text())
    assert told["adapter"]["name"] == f"{made.name} at {made.head}"
    local = sample(calm, str(pushed_run / "adapter" / file), tmp_path / "local")
    assert local.code == 0, local.output
    one, other = (Image.open(next((tmp_path / kind).glob("*.png"))) for kind in ("hub", "local"))
    assert one.tobytes() == other.tobytes()


def test_the_adapter_alone_is_fetched_and_an_older_commit_is_drawn_with(calm, tmp_path):
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
        drawn = [next((tmp_path / kind).glob("prompt*.png")) for kind in ("old", "at")]
        assert Image.open(drawn[0]).tobytes() == Image.open(drawn[1]).tobytes()
        answer = sample(calm, f"ann/dog@{old}", tmp_path / "twice", "--revision", "main")
        assert (answer.code, "names one already" in answer.output) == (2, True), answer.output
        answer = sample(calm, "ann/dog", tmp_path / "new")
        assert (answer.code, "not a whole safetensors file" in answer.output) == (2, True), answer.output
    finally:
        repository.commits.pop()


def test_a_run_starts_from_an_adapter_on_the_hub(calm, pushed_run):
    run = train(calm, *QUICK, "lora.init_from=ann/dog", "optimizer.lr=1e-9", name="again")
    one, other = (load_file(folder / "adapter" / ADAPTER) for folder in (pushed_run, run))
    assert all(abs(one[name] - other[name]).max() < 1e-6 for name in one)
    assert any(abs(tensor).max() > 1e-3 for name, tensor in other.items() if ".lora_B." in name)


def test_a_repository_without_an_adapter_and_one_that_is_none_are_told(calm, tmp_path):
    parts(calm, "ann/empty", "README.md", "kohya/dog.safetensors")
    told = "ann/empty: holds neither a pipeline (model_index.json) nor an adapter"
    recipe = str(write_recipe(calm.folder, "./base", name="from"))
    for source, code, said in (
        ("ann/empty", 2, told),
        ("ann/nothing", 4, "no repository ann/nothing on the Hub"),
    ):
        answer = sample(calm, source, tmp_path / "none")
        assert (answer.code, said in answer.output) == (code, True), answer.output
        calm.hub.faults = faults = Faults()
        answer = calm.worker.run("train", recipe, f"model.path={BASE}", f"lora.init_from={source}")
        assert (answer.code, said in answer.output) == (code, True), answer.output
        assert not [request for request in faults.requests if BASE in request], "before the base is opened"


def test_of_a_killed_run_the_newest_checkpoint_is_started_from_and_without_one_the_adapter(calm, tmp_path):
    run = train(calm, *QUICK, "optimizer.lr=0.02", name="killed")
    (run / "adapter").rename(run / "elsewhere")
    again = train(calm, *QUICK, f"lora.init_from={run}", "optimizer.lr=1e-9", name="started")
    one, other = (load_file(file / ADAPTER) for file in (run / "elsewhere", again / "adapter"))
    assert all(abs(one[name] - other[name]).max() < 1e-6 for name in one)
    (run / "elsewhere").rename(run / "adapter")
    (run / "checkpoints").rename(run / "gone")
    answer = sample(calm, str(run), tmp_path / "drawn")
    assert answer.code == 0, answer.output
    answer = sample(calm, str(run), tmp_path / "drawn2", "--checkpoint", "1")
    assert (answer.code, "has no checkpoint yet" in answer.output) == (2, True), answer.output
