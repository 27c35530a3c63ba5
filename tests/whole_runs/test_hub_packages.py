"""A transformer and a T5 from Hub repositories that are no pipelines, beside a pipeline without their weights."""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import T5EncoderModel

from halfbyte.trainer.export.provenance import PROVENANCE_FILE, read_provenance
from halfbyte.trainer.training.metrics import read_metrics

from hub_faults import Faults
from hub_runs import BASE, hub_with_base, train
from hub_store import Blob, Repository
from packages import T5_WEIGHTS, WEIGHTS, with_halved_norms
from runs import command, run_here, write_recipe
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
    """A run on the package, and what it asked the Hub for."""
    packaged_hub.hub.faults = faults = Faults()
    return train(packaged_hub, *QUICK, *BOTH), faults.requests


def losses(run):
    return [row.loss for row in read_metrics(run / "metrics.csv")]


def test_it_trains_as_on_a_pipeline_with_these_parts(trained, flux_package, bare_flux, tmp_path):
    run, _ = trained
    assert_same_tensors(run / WEIGHTS, flux_package / "both" / WEIGHTS)
    whole = shutil.copytree(bare_flux, tmp_path / "whole")
    shutil.copytree(flux_package / "both", whole, dirs_exist_ok=True)
    alone = run_here(write_recipe(tmp_path, whole), *QUICK)
    assert losses(run) == losses(alone)
    assert_same_tensors(run / ADAPTER, alone / ADAPTER)


def test_a_quantized_t5_makes_other_embeddings_than_a_plain_one(trained, flux_package, mini_flux, tmp_path):
    """That what is compared above is the package's T5 at all."""
    own = (f"model.transformer={flux_package / 'both'}",)
    assert losses(run_here(write_recipe(tmp_path, mini_flux), *QUICK, *own)) != losses(trained[0])


def test_only_what_is_needed_is_fetched(trained):
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
    at = f"[{PACKAGE}](https://huggingface.co/{PACKAGE}) at revision [`{commit}`]"
    assert f"The transformer was given apart from that model, as that of {at}" in card
    assert f"The text encoder T5 was given apart from that model, as that of {at}" in card
    assert f'"{PACKAGE}", subfolder="transformer", revision="{commit}", torch_dtype=torch.float32' in card
    assert f'"{PACKAGE}", subfolder="text_encoder_2", revision="{commit}", dtype=torch.float32' in card
    assert f"transformer: {PACKAGE}" in card
    assert "text_encoder_2=text_encoder_2," in card
    with_base = calm.worker.run("push", str(run), "--repo", "ann/card", "--dry-run").output
    assert '"ann/card", subfolder="transformer", torch_dtype' in with_base


def test_pictures_and_exports_are_of_the_same_parts(calm, trained, tmp_path):
    run, _ = trained
    commit = calm.store.model(PACKAGE).head
    drawn = ("--prompt", "a", "--steps", "1", "--width", "64", "--height", "64", "--output")
    answer = calm.worker.run("sample", str(run), *drawn, str(tmp_path / "drawn"))
    assert answer.code == 0, answer.output
    assert f"transformer of {PACKAGE} @ {commit[:12]}; T5 of {PACKAGE} @ {commit[:12]}" in answer.output
    (record,) = json.loads((tmp_path / "drawn" / "pictures.json").read_text())
    told = record["base"]
    assert told["transformer"] == told["text_encoder"] == f"{PACKAGE}@{commit}"
    answer = calm.worker.run("export", str(run), "--base", "--self-check")
    assert answer.code == 0, answer.output
    answer = calm.worker.run("export", str(run), "--text-encoder")
    assert answer.code == 2
    assert "text_encoder_2 is quantized already" in answer.output


def test_a_run_resumes_on_the_commits_that_it_was_started_on(calm, trained):
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
        assert f"T5 of {PACKAGE} @ {began_on[:12]}" in answer.output
        assert_same_tensors(trained[0] / ADAPTER, calm.folder / "killed" / ADAPTER)
        moved = shutil.copytree(calm.folder / "killed", calm.folder / "moved")
        settings = yaml.safe_load((moved / "recipe.yaml").read_text())
        settings["model"]["text_encoder"] = f"{PACKAGE}@{head}"
        (moved / "recipe.yaml").write_text(yaml.safe_dump(settings))
        answer = calm.worker.run("export", str(moved))
        assert answer.code == 2, answer.output
        assert (
            f"model.text_encoder: got {head}, but {moved} was started on {PACKAGE} at {began_on}"
            in answer.output
        )
    finally:
        repository.commits.pop()


def test_a_repository_of_one_model_and_a_revision_of_another(calm):
    """T5 alone in a repository, and an older commit of the package."""
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


def test_a_plain_t5_in_several_files_is_the_pipelines(calm, mini_flux, flux_package, tmp_path):
    t5 = T5EncoderModel.from_pretrained(mini_flux / "text_encoder_2", dtype=torch.bfloat16)
    t5.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-0*.safetensors"))) > 1
    calm.store.add(Repository.of_folder("we/sharded", tmp_path / "sharded"))
    quick = (*QUICK, "train.steps=1", f"model.transformer={flux_package / 'both'}")
    run = train(calm, *quick, "model.text_encoder=we/sharded", name="sharded")
    assert losses(run) == losses(run_here(write_recipe(tmp_path, mini_flux), *quick))


WRONG = [
    ("transformer", LOOSE_T5, 2, "describes a T5EncoderModel, expected a FluxTransformer2DModel"),
    ("transformer", "ann/empty", 2, "holds neither transformer/config.json nor config.json"),
    ("transformer", "we/sd3", 2, "describes a SD3Transformer2DModel, expected a FluxTransformer2DModel"),
    ("transformer", GATED, 4, f"{GATED} is gated: accept its licence at"),
    ("transformer", "we/nothing", 4, "no repository we/nothing on the Hub"),
    ("transformer", f"{PACKAGE}@v9", 4, f"{PACKAGE} has no revision 'v9'"),
    ("text_encoder", "we/clip", 2, "describes a CLIPTextModel, expected a T5EncoderModel"),
    ("text_encoder", "we/wide", 2, "its embeddings are 96 wide, and the transformer takes 64"),
    ("text_encoder", "we/odd", 2, "quantization_config has quant_method 'gptq'; accepted: bitsandbytes"),
    ("text_encoder", "we/nothing", 4, "no repository we/nothing on the Hub"),
]


@pytest.mark.parametrize(("field", "named", "code", "said"), WRONG)
def test_what_does_not_fit_is_told_with_its_line_before_any_weights_are_fetched(
    calm, field, named, code, said
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
    assert said in answer.output
    assert not [request for request in calm.hub.faults.requests if request.endswith(".safetensors")]
    assert not (calm.folder / "wrong").exists()


def test_a_pipeline_that_is_not_there_is_told_with_its_line(calm):
    recipe = write_recipe(calm.folder, "we/nothing", name="absent")
    answer = calm.worker.run("train", str(recipe))
    assert (answer.code, f"{recipe}:2: model.path: no repository we/nothing" in answer.output) == (4, True)
    settings = (f"model.path={BASE}", "model.revision=v9")
    answer = calm.worker.run("train", str(recipe), *settings)
    assert answer.code == 4
    assert f"command line: model.revision=v9: {BASE} has no revision 'v9'" in answer.output


def test_weights_that_are_not_there_are_told_of_the_repository(calm):
    tree = dict(calm.store.model(PACKAGE).tree)
    tree["transformer/pytorch_model.bin"] = tree.pop(WEIGHTS)
    calm.store.add(Repository.new("we/pickled")).commit(tree)
    recipe = str(write_recipe(calm.folder, BASE, name="pickled"))
    answer = calm.worker.run("train", recipe, f"model.path={BASE}", "model.transformer=we/pickled", BOTH[1])
    assert answer.code == 2, answer.output
    assert "model.transformer=we/pickled: we/pickled at " in answer.output
    assert "no weights, expected diffusion_pytorch_model.safetensors" in answer.output


def test_a_package_in_model_path_is_told_what_to_write(calm, flux_package):
    for named, told in (
        (
            PACKAGE,
            f"write model.transformer: {PACKAGE} and model.text_encoder: {PACKAGE}, and as model.path the",
        ),
        (LOOSE_T5, f"write model.text_encoder: {LOOSE_T5}, and as model.path the"),
        (flux_package / "both", f"and model.text_encoder: {flux_package / 'both'}, and as model.path the"),
    ):
        recipe = write_recipe(calm.folder, named, name="path")
        for run in ("train", "plan"):
            calm.hub.faults = faults = Faults()
            answer = calm.worker.run(run, str(recipe))
            assert answer.code == 2, answer.output
            assert f"{recipe}:2: model.path: {named}: no model_index.json" in answer.output
            assert told in answer.output
            assert not [request for request in faults.requests if request.endswith(".safetensors")]
    answer = calm.worker.run("train", str(recipe), f"model.path={PACKAGE}", "model.revision=main")
    assert f"write model.transformer: {PACKAGE}@main and" in answer.output


def test_a_plan_reads_configurations_and_counts_t5_as_it_is_stored(calm):
    recipe = str(write_recipe(calm.folder, BASE, name="planned"))
    taken = {}
    for held in ("auto", "nf4"):
        settings = (f"model.text_encoder={LOOSE_T5}", f"model.text_encoder_quant={held}")
        answer = calm.worker.run("plan", recipe, BOTH[0], *settings, "--json")
        assert answer.code == 0, answer.output
        plan = json.loads(answer.output[answer.output.index("{") :])
        (phase,) = [phase for phase in plan["phases"] if phase["name"] == "encode texts"]
        taken[held] = phase["device"]["text_encoder_2"]
    # 12 of 14 layers in a byte a weight, and wo and the embedding in two.
    assert taken["auto"] == taken["nf4"]
    tree = calm.store.model(LOOSE_T5).tree
    assert taken["auto"] == pytest.approx(len(tree["model.safetensors"].content), rel=0.05)
    assert not [request for request in calm.hub.faults.requests if request.endswith(".safetensors")]


def test_the_adapter_that_a_run_starts_from_is_pinned(calm, trained, tmp_path):
    """Also where the run goes on, though its repository is broken by then."""
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
    assert "Training started from the adapter [ann/dog]" in card


def test_one_process_asks_where_the_branches_are(calm, tmp_path):
    recipe = write_recipe(tmp_path, BASE)
    launched = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "halfbyte.trainer",
    )
    hub = {"HF_ENDPOINT": calm.hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    online = hub | {"HF_HUB_OFFLINE": "0"}
    quick = (*QUICK, "train.steps=1", "train.grad_accumulation=1")
    done = command(*launched, str(recipe), *quick, *BOTH, environ=online)
    assert done.returncode == 0, done.stderr
    asked = [r for r in calm.hub.faults.requests if r.endswith("/revision/main")]
    # The package once for each of its settings.
    assert sorted(asked) == [f"GET /api/models/{name}/revision/main" for name in (BASE, PACKAGE, PACKAGE)]
    calm.hub.faults = Faults()
    wrong = "model.text_encoder=we/clip"
    done = command(*launched, str(recipe), *quick, wrong, f"output.dir={tmp_path / 'no'}", environ=online)
    assert done.returncode != 0
    assert done.stderr.count(f"error: command line: {wrong}: ") == 1
