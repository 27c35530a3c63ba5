"""A run stays on the base it was started on, even if the repository or the folder changes later."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load, load_file, save, save_file
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.run_folder.pinned_base import find_commits

from hub_runs import BASE, hub_with_base, train
from hub_store import Blob
from runs import run_here, write_recipe

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ("sample.prompts=[]", "optimizer.lr=0.02")


def halved(content):
    return save({name: tensor / 2 for name, tensor in load(content).items()}, metadata={"format": "pt"})


def bases(folder):
    return load_file(folder / WEIGHTS)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def moved_hub(tmp_path_factory, mini_flux):
    """A Hub whose base got new weights after a finished run of four steps, and after two steps of the run
    `killed`."""
    with hub_with_base(tmp_path_factory.mktemp("hub"), mini_flux) as to:
        base = to.store.model(BASE)
        began_on = base.head
        train(to, *SMALL)
        train(to, *SMALL, "train.steps=2", name="killed")
        base.commit({**base.tree, WEIGHTS: Blob(halved(base.tree[WEIGHTS].content), large=True)})
        yield to, began_on, base.head


def test_export_uses_the_commit_of_the_training(moved_hub):
    to, began_on, head = moved_hub
    run = to.folder / "dog"
    trained = bases(run)
    answer = to.worker.run("export", str(run), "--base", "--self-check")
    assert answer.code == 0, answer.output
    assert_same(trained, bases(run))
    for file in ("halfbyte.json", "adapter_config.json"):
        assert json.loads((run / "adapter" / file).read_text())["revision"] == began_on != head
    card = to.worker.run("push", str(run), "--repo", "ann/card", "--dry-run").output
    assert began_on in card
    assert head not in card


def test_sampling_uses_the_commit_of_the_training(moved_hub, tmp_path):
    to, began_on, _ = moved_hub
    drawn = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64", "--output")
    answer = to.worker.run("sample", str(to.folder / "dog"), *drawn, str(tmp_path / "drawn"))
    assert answer.code == 0, answer.output
    (record,) = json.loads((tmp_path / "drawn" / "pictures.json").read_text())
    assert record["base"]["revision"] == began_on


def test_a_run_resumes_on_the_commit_of_its_start(moved_hub):
    to, began_on, head = moved_hub
    recipe = to.folder / "killed.yaml"
    resumed = ("train", str(recipe), f"model.path={BASE}", *SMALL, "--resume")
    refused = to.worker.run(*resumed, f"model.revision={head}")
    assert (refused.code, f"model.revision: null -> '{head}'" in refused.output) == (2, True), refused.output
    answer = to.worker.run(*resumed)
    assert answer.code == 0, answer.output
    assert f"{BASE} @ {began_on[:12]}" in answer.output
    assert_same(bases(to.folder / "dog"), bases(to.folder / "killed"))
    adapters = [
        load_file(to.folder / name / "adapter" / "pytorch_lora_weights.safetensors")
        for name in ("dog", "killed")
    ]
    assert_same(*adapters)


def test_a_recipe_that_names_another_commit_is_refused(moved_hub, tmp_path):
    to, began_on, head = moved_hub
    run = shutil.copytree(to.folder / "dog", tmp_path / "dog")
    set_model(run, revision=head)
    answer = to.worker.run("export", str(run))
    assert answer.code == 2, answer.output
    assert f"model.revision: got {head}" in answer.output
    assert began_on in answer.output
    set_model(run, revision=began_on)
    assert to.worker.run("export", str(run), "--no-self-check").code == 0


def set_model(run, **fields):
    recipe = run / "recipe.yaml"
    settings = yaml.safe_load(recipe.read_text())
    settings["model"] |= fields
    recipe.write_text(yaml.safe_dump(settings))


def refusal(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    return result.output


@pytest.fixture
def run_on_a_copy(mini_flux, tmp_path):
    model = shutil.copytree(mini_flux, tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    return recipe, run_here(recipe, *SMALL, "train.steps=2"), model


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        (WEIGHTS, "transformer"),
        ("text_encoder/model.safetensors", "encoder"),
    ],
)
def test_a_folder_that_changed_is_refused(run_on_a_copy, tmp_path, file, changed):
    recipe, run, model = run_on_a_copy
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    content = (model / file).read_bytes()
    (model / file).write_bytes(halved(content))
    for command in (
        ("export", run),
        ("sample", run, "--prompt", "a", "--output", tmp_path / "drawn"),
        ("train", recipe, *SMALL, "--resume"),
    ):
        output = refusal(*command)
        assert re.search(
            rf"model\.path: {re.escape(str(model))}: [^(]*{changed}[^(]* {re.escape(str(run))} ", output
        )
        assert f"lora.init_from={run}" in output
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (model / file).write_bytes(content)
    run_here(recipe, *SMALL, resume=True)


def test_a_moved_folder_is_named_and_its_new_path_is_accepted(run_on_a_copy, tmp_path):
    _, run, model = run_on_a_copy
    model.rename(tmp_path / "elsewhere")
    for command in (("export", run), ("sample", run, "--prompt", "a")):
        output = refusal(*command)
        assert f"model.path: {model}: " in output
        assert "recipe.yaml" in output
    set_model(run, path=str(tmp_path / "elsewhere"))
    done = CliRunner().invoke(app, ["export", str(run), "--no-self-check"])
    assert done.exit_code == 0, done.output


def test_a_separate_transformer_that_moved_or_changed_is_named(mini_flux, tmp_path):
    own = shutil.copytree(mini_flux / "transformer", tmp_path / "own")
    recipe = write_recipe(tmp_path, mini_flux)
    run = run_here(recipe, *SMALL, "train.steps=1", f"model.transformer={own}")
    own.rename(tmp_path / "elsewhere")
    assert f"model.transformer: {own}: " in refusal("export", run)
    set_model(run, transformer=str(tmp_path / "elsewhere"))
    weights = tmp_path / "elsewhere" / WEIGHTS.partition("/")[2]
    save_file(load(halved(weights.read_bytes())), weights, metadata={"format": "pt"})
    output = refusal("export", run)
    assert f"model.transformer: {tmp_path / 'elsewhere'}: the transformer" in output
    assert str(run) in output


def test_a_run_without_a_pin_uses_the_base_of_its_recipe(run_on_a_copy, caplog):
    recipe, run, _ = run_on_a_copy
    (run / "base.json").unlink()
    run_here(recipe, *SMALL, resume=True)
    assert "base.json" in caplog.text
    assert (run / "base.json").is_file()
    (run / "base.json").write_text("{")
    assert f"{run / 'base.json'}: " in refusal("export", run)


def test_the_pin_of_an_older_version_is_still_read(tmp_path, bare_flux, flux_package):
    run = RunFolder(tmp_path)
    run.adapter.mkdir()
    run.pin.write_text(json.dumps({"revision": "a" * 40, "transformer": None, "rest": None}))
    recipe = load_recipe(
        write_recipe(tmp_path, bare_flux),
        [f"model.transformer={flux_package / 'both'}", "model.path=ann/dog"],
    )
    model = recipe.model.model_copy(update={"revision": "b" * 40})
    with pytest.raises(ValueError, match=f"model.revision: got {'b' * 40}, but .* on ann/dog at {'a' * 40}"):
        find_commits(run, model, None)
