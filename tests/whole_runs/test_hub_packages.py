"""Runs that take the transformer and T5 from their own Hub repositories, and the other parts from a pipeline."""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import T5EncoderModel

from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE
from halfbyte.trainer.export.provenance import read_provenance
from halfbyte.trainer.training.metrics import read_metrics

from hub_faults import Faults
from hub_runs import BASE, hub_with_base, train
from hub_store import Blob, Repository
from packages import T5_WEIGHTS, WEIGHTS, with_halved_norms
from push_worker import PushWorker
from runs import run_here, write_recipe
from tensors import assert_same_tensors

PACKAGE, LOOSE_T5, GATED = "we/flux-nf4-pkg", "we/t5-int8", "we/gated"
ADAPTER = "adapter/pytorch_lora_weights.safetensors"
QUICK = ("sample.prompts=[]", "optimizer.lr=0.02")
BOTH = (f"model.transformer={PACKAGE}", f"model.text_encoder={PACKAGE}")


@pytest.fixture(scope="module")
def packaged_hub(tmp_path_factory, flux_package, bare_flux, mini_sd3):
    with hub_with_base(tmp_path_factory.mktemp("hub"), bare_flux) as to:
        for name, folder in (
            (PACKAGE, flux_package / "both"),
            (LOOSE_T5, flux_package / "t5"),
            ("we/sd3", mini_sd3),
            ("we/clip", bare_flux / "text_encoder"),
        ):
            to.store.add(Repository.of_folder(name, folder))
        to.store.add(Repository.of_folder(GATED, flux_package / "both", gated=True))
        yield to


@pytest.fixture
def calm(packaged_hub):
    packaged_hub.hub.faults = Faults()
    return packaged_hub


@pytest.fixture(scope="module")
def trained(packaged_hub):
    """A run on the package, and the requests it sent to the Hub."""
    packaged_hub.hub.faults = faults = Faults()
    return train(packaged_hub, *QUICK, *BOTH), faults.requests


def losses(run):
    return [row.loss for row in read_metrics(run / "metrics.csv")]


def test_losses_and_adapter_equal_those_of_a_pipeline_with_the_same_parts(
    trained, flux_package, bare_flux, tmp_path
):
    run, _ = trained
    assert_same_tensors(run / WEIGHTS, flux_package / "both" / WEIGHTS)
    whole = shutil.copytree(bare_flux, tmp_path / "whole")
    shutil.copytree(flux_package / "both", whole, dirs_exist_ok=True)
    alone = run_here(write_recipe(tmp_path, whole), *QUICK)
    assert losses(run) == losses(alone)
    assert_same_tensors(run / ADAPTER, alone / ADAPTER)


def test_a_quantized_t5_gives_other_embeddings_than_a_plain_one(trained, flux_package, mini_flux, tmp_path):
    """Shows that the test above really compares the package's T5."""
    own = (f"model.transformer={flux_package / 'both'}",)
    assert losses(run_here(write_recipe(tmp_path, mini_flux), *QUICK, *own)) != losses(trained[0])


def test_only_the_needed_files_are_fetched(trained):
    fetched = {r.removeprefix("GET /") for r in trained[1] if r.startswith("GET /we/")}
    files = {re.sub(r"^we/flux-nf4-pkg/resolve/\w+/", "", request) for request in fetched}
    assert files == {"transformer/config.json", WEIGHTS, "text_encoder_2/config.json", T5_WEIGHTS}


def test_the_commits_are_pinned_exported_and_on_the_card(calm, trained):
    run, _ = trained
    base, commit = calm.store.model(BASE).head, calm.store.model(PACKAGE).head
    assert json.loads((run / "base.json").read_text())["commits"] == {
        "model.path": base,
        "model.transformer": commit,
        "model.text_encoder": commit,
    }
    written = read_provenance(run / "adapter" / PROVENANCE_FILE)
    assert {
        name: (part.repository, part.revision, part.subfolder) for name, part in written.parts.items()
    } == {name: (PACKAGE, commit, name) for name in ("transformer", "text_encoder_2")}
    card = calm.worker.run("push", str(run), "--repo", "ann/card", "--dry-run", "--no-base").output
    linked = [
        line
        for line in card.splitlines()
        if f"](https://huggingface.co/{PACKAGE})" in line and commit in line
    ]
    for part in ("transformer", "T5"):
        assert any(part in line for line in linked), part
    assert f'"{PACKAGE}", subfolder="transformer", revision="{commit}", torch_dtype=torch.float32' in card
    assert f'"{PACKAGE}", subfolder="text_encoder_2", revision="{commit}", dtype=torch.float32' in card
    assert f"transformer: {PACKAGE}" in card
    assert "text_encoder_2=text_encoder_2," in card
    with_base = calm.worker.run("push", str(run), "--repo", "ann/card", "--dry-run").output
    assert '"ann/card", subfolder="transformer", torch_dtype' in with_base


def test_samples_and_exports_use_the_same_parts(calm, trained, tmp_path):
    run, _ = trained
    commit = calm.store.model(PACKAGE).head
    drawn = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64", "--output")
    answer = calm.worker.run("sample", str(run), *drawn, str(tmp_path / "drawn"))
    assert answer.code == 0, answer.output
    lines = answer.output.splitlines()
    assert any(line.count(PACKAGE) == line.count(commit[:12]) == 2 for line in lines), "transformer and T5"
    (record,) = json.loads((tmp_path / "drawn" / "pictures.json").read_text())
    base = record["base"]
    assert base["transformer"] == base["text_encoder"] == f"{PACKAGE}@{commit}"
    answer = calm.worker.run("export", str(run), "--base", "--self-check")
    assert answer.code == 0, answer.output
    answer = calm.worker.run("export", str(run), "--text-encoder")
    assert answer.code == 2
    assert "text_encoder_2" in answer.output


def test_a_run_resumes_on_the_commits_it_started_from(calm, trained):
    train(calm, *QUICK, *BOTH, "train.steps=2", name="killed")
    repository = calm.store.model(PACKAGE)
    began_on = repository.head
    changed = {T5_WEIGHTS: Blob(with_halved_norms(repository.tree[T5_WEIGHTS].content), large=True)}
    head = repository.commit(
        {**repository.tree, **changed, "transformer/config.json": Blob(b"{", large=False)}
    )
    try:
        recipe = str(calm.folder / "killed.yaml")
        resumed = ("train", recipe, f"model.path={BASE}", *QUICK, *BOTH, "--resume")
        refused = calm.worker.run(*resumed, f"model.text_encoder={PACKAGE}@{head}")
        assert refused.code == 2, refused.output
        answer = calm.worker.run(*resumed)
        assert answer.code == 0, answer.output
        assert PACKAGE in answer.output
        assert began_on[:12] in answer.output
        assert head[:12] not in answer.output
        assert_same_tensors(trained[0] / ADAPTER, calm.folder / "killed" / ADAPTER)
        moved = shutil.copytree(calm.folder / "killed", calm.folder / "moved")
        settings = yaml.safe_load((moved / "recipe.yaml").read_text())
        settings["model"]["text_encoder"] = f"{PACKAGE}@{head}"
        (moved / "recipe.yaml").write_text(yaml.safe_dump(settings))
        answer = calm.worker.run("export", str(moved))
        assert answer.code == 2, answer.output
        for fragment in ("model.text_encoder: ", head, str(moved), PACKAGE, began_on):
            assert fragment in answer.output
    finally:
        repository.commits.pop()


def test_a_repository_with_only_t5_and_an_older_revision_of_the_package(calm):
    repository = calm.store.model(PACKAGE)
    old = repository.head
    repository.commit({"transformer/config.json": Blob(b"{", large=False)})
    try:
        own = (f"model.transformer={PACKAGE}@{old}", f"model.text_encoder={LOOSE_T5}")
        run = train(calm, *QUICK, *own, "train.steps=1", "train.grad_accumulation=1", name="loose")
    finally:
        repository.commits.pop()
    commits = json.loads((run / "base.json").read_text())["commits"]
    assert commits["model.transformer"] == old
    assert commits["model.text_encoder"] == calm.store.model(LOOSE_T5).head
    (part,) = [
        p for n, p in read_provenance(run / "adapter" / PROVENANCE_FILE).parts.items() if n != "transformer"
    ]
    assert part.subfolder is None


def test_a_sharded_unquantized_t5_equals_the_pipelines_own(calm, mini_flux, flux_package, tmp_path):
    t5 = T5EncoderModel.from_pretrained(mini_flux / "text_encoder_2", dtype=torch.bfloat16)
    t5.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-0*.safetensors"))) > 1
    calm.store.add(Repository.of_folder("we/sharded", tmp_path / "sharded"))
    quick = (*QUICK, "train.steps=1", f"model.transformer={flux_package / 'both'}")
    run = train(calm, *quick, "model.text_encoder=we/sharded", name="sharded")
    assert losses(run) == losses(run_here(write_recipe(tmp_path, mini_flux), *quick))


WRONG = [
    # (setting, its value, exit code, what the message contains)
    ("transformer", LOOSE_T5, 2, ("T5EncoderModel", "FluxTransformer2DModel")),
    ("transformer", "ann/empty", 2, ("transformer/config.json", "config.json")),
    ("transformer", "we/sd3", 2, ("SD3Transformer2DModel", "FluxTransformer2DModel")),
    ("transformer", GATED, 4, (GATED, "gated", "://", f"/{GATED}", "HF_TOKEN")),
    ("transformer", "we/nothing", 4, ("we/nothing",)),
    ("transformer", f"{PACKAGE}@v9", 4, (PACKAGE, "v9")),
    ("text_encoder", "we/clip", 2, ("CLIPTextModel", "T5EncoderModel")),
    ("text_encoder", "we/wide", 2, ("96", "64")),
    ("text_encoder", "we/odd", 2, ("quant_method", "gptq", "bitsandbytes")),
    ("text_encoder", "we/nothing", 4, ("we/nothing",)),
]


@pytest.mark.parametrize(("field", "named", "code", "fragments"), WRONG)
def test_an_unsuitable_part_is_refused_with_its_line_before_weights_are_fetched(
    calm, field, named, code, fragments
):
    if named in ("we/wide", "we/odd"):
        tree = calm.store.model(LOOSE_T5).tree
        config = json.loads(tree["config.json"].content)
        config |= {"d_model": 96} if named == "we/wide" else {"quantization_config": {"quant_method": "gptq"}}
        calm.store.add(Repository.new(named)).commit(
            {**tree, "config.json": Blob(json.dumps(config).encode(), large=False)}
        )
    if named == "ann/empty":
        calm.store.add(Repository.new(named))
    recipe = write_recipe(calm.folder, BASE, name="wrong")
    other = "" if field == "text_encoder" else f"text_encoder: {PACKAGE}, "
    recipe.write_text(recipe.read_text().replace(f"path: {BASE},", f"path: {BASE}, {other}{field}: {named},"))
    answer = calm.worker.run("train", str(recipe))
    assert answer.code == code, answer.output
    assert f"{recipe}:2: model.{field}: " in answer.output
    message = answer.output.partition(f"{recipe}:2: model.{field}: ")[2]
    for fragment in fragments:
        assert fragment in message
    assert not [request for request in calm.hub.faults.requests if request.endswith(".safetensors")]
    assert not (calm.folder / "wrong").exists()


def test_a_missing_pipeline_is_reported_with_its_line(calm):
    recipe = write_recipe(calm.folder, "we/nothing", name="absent")
    answer = calm.worker.run("train", str(recipe))
    assert answer.code == 4
    assert "we/nothing" in answer.output.partition(f"{recipe}:2: model.path: ")[2]
    settings = (f"model.path={BASE}", "model.revision=v9")
    answer = calm.worker.run("train", str(recipe), *settings)
    assert answer.code == 4
    message = answer.output.partition("command line: model.revision=v9: ")[2]
    assert BASE in message
    assert "v9" in message


def test_missing_weights_are_reported_with_the_repository(calm):
    tree = dict(calm.store.model(PACKAGE).tree)
    tree["transformer/pytorch_model.bin"] = tree.pop(WEIGHTS)
    calm.store.add(Repository.new("we/pickled")).commit(tree)
    recipe = str(write_recipe(calm.folder, BASE, name="pickled"))
    answer = calm.worker.run("train", recipe, f"model.path={BASE}", "model.transformer=we/pickled", BOTH[1])
    assert answer.code == 2, answer.output
    message = answer.output.partition("model.transformer=we/pickled: ")[2]
    assert "we/pickled" in message
    assert "diffusion_pytorch_model.safetensors" in message


def test_a_package_given_as_model_path_is_answered_with_the_settings_to_write(calm, flux_package):
    both = flux_package / "both"
    for named, settings in (
        (PACKAGE, (f"model.transformer: {PACKAGE}", f"model.text_encoder: {PACKAGE}")),
        (LOOSE_T5, (f"model.text_encoder: {LOOSE_T5}",)),
        (both, (f"model.transformer: {both}", f"model.text_encoder: {both}")),
    ):
        recipe = write_recipe(calm.folder, named, name="path")
        for run in ("train", "plan"):
            calm.hub.faults = faults = Faults()
            answer = calm.worker.run(run, str(recipe))
            assert answer.code == 2, answer.output
            message = answer.output.partition(f"{recipe}:2: model.path: ")[2]
            for fragment in (str(named), "model_index.json", *settings):
                assert fragment in message
            assert ("model.transformer" in message) == (len(settings) == 2)
            assert not [request for request in faults.requests if request.endswith(".safetensors")]
    answer = calm.worker.run("train", str(recipe), f"model.path={PACKAGE}", "model.revision=main")
    assert f"model.transformer: {PACKAGE}@main" in answer.output


def test_a_plan_reads_only_configs_and_counts_t5_as_stored(calm):
    recipe = str(write_recipe(calm.folder, BASE, name="planned"))
    device_bytes = {}
    for quant in ("auto", "nf4"):
        settings = (f"model.text_encoder={LOOSE_T5}", f"model.text_encoder_quant={quant}")
        answer = calm.worker.run("plan", recipe, BOTH[0], *settings, "--json")
        assert answer.code == 0, answer.output
        plan = json.loads(answer.output[answer.output.index("{") :])
        (phase,) = [phase for phase in plan["phases"] if phase["name"] == "encode texts"]
        device_bytes[quant] = phase["device"]["text_encoder_2"]
    # 12 of the 14 layers take one byte per weight; wo and the embedding take two.
    assert device_bytes["auto"] == device_bytes["nf4"]
    tree = calm.store.model(LOOSE_T5).tree
    assert device_bytes["auto"] == pytest.approx(len(tree["model.safetensors"].content), rel=0.05)
    assert not [request for request in calm.hub.faults.requests if request.endswith(".safetensors")]


def test_the_adapter_that_a_run_starts_from_is_pinned(calm, trained, tmp_path):
    """A resumed run does not read the repository's newer, broken commit."""
    store, adapter = calm.store, (trained[0] / ADAPTER).read_bytes()
    name = ADAPTER.partition("/")[2]
    repository = store.add(Repository.new("ann/dog"))
    began_on = repository.commit({name: Blob(adapter, large=True)})
    start = (*QUICK, *BOTH, "lora.init_from=ann/dog", "train.grad_accumulation=1")
    run = train(calm, *start, "train.steps=1", name="again")
    assert json.loads((run / "base.json").read_text())["commits"]["lora.init_from"] == began_on
    repository.commit({name: Blob(b"broken", large=True)})
    resumed = (
        "train",
        str(calm.folder / "again.yaml"),
        f"model.path={BASE}",
        *start,
        "train.steps=2",
        "--resume",
    )
    answer = calm.worker.run(*resumed)
    assert answer.code == 0, answer.output
    started = read_provenance(run / "adapter" / PROVENANCE_FILE).started_from
    assert started is not None
    assert (started.repository, started.revision) == ("ann/dog", began_on)
    card = calm.worker.run("push", str(run), "--repo", "ann/card", "--dry-run").output
    assert "[ann/dog]" in card


def test_only_one_process_resolves_the_revisions(calm, tmp_path):
    recipe = write_recipe(tmp_path, BASE)
    quick = (*QUICK, "train.steps=1", "train.grad_accumulation=1")
    with PushWorker(calm.hub.endpoint, tmp_path / "home", None) as worker:
        answers = worker.run_ranks(2, "train", str(recipe), *quick, *BOTH)
        assert [answer.code for answer in answers] == [0, 0], answers
        asked = [r for r in calm.hub.faults.requests if r.endswith("/revision/main")]
        # The package is asked for twice: once for each setting that names it.
        assert sorted(asked) == [f"GET /api/models/{name}/revision/main" for name in (BASE, PACKAGE, PACKAGE)]
        calm.hub.faults = Faults()
        wrong = "model.text_encoder=we/clip"
        answers = worker.run_ranks(2, "train", str(recipe), *quick, wrong, f"output.dir={tmp_path / 'no'}")
        assert all(answer.code for answer in answers)
        assert "".join(answer.output for answer in answers).count(f"error: command line: {wrong}: ") == 1
