"""A transformer and a T5 from Hub repositories that are no pipelines, beside a pipeline without their weights."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load, load_file, save
from transformers import T5EncoderModel
from typer.testing import CliRunner

from halfbyte.trainer.commands import app
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.flux import Flux
from halfbyte.trainer.families.sd3 import SD3
from halfbyte.trainer.file_digests import FileDigests
from halfbyte.trainer.metrics import read_metrics
from halfbyte.trainer.pinned_base import find_commits
from halfbyte.trainer.provenance import PROVENANCE_FILE, read_provenance
from halfbyte.trainer.recipe import load_recipe
from halfbyte.trainer.run_folder import RunFolder

from hub_faults import Faults
from hub_runs import BASE, hub_with_base, train
from hub_store import Blob, Repository
from packages import write_package, write_t5
from runs import command, run_here, write_recipe
from small_recipe import SMALL, Write, problems

PACKAGE, LOOSE_T5, GATED = "we/flux-nf4-pkg", "we/t5-int8", "we/gated"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
T5_WEIGHTS = "text_encoder_2/model.safetensors"
ADAPTER = "adapter/pytorch_lora_weights.safetensors"
QUICK = ("sample.prompts=[]", "optimizer.lr=0.02")
BOTH = (f"model.transformer={PACKAGE}", f"model.text_encoder={PACKAGE}")


@pytest.fixture(scope="module")
def package(tmp_path_factory, mini_flux):
    """Both parts in NF4 by stock bitsandbytes; and a T5 in int8 in a folder of its own."""
    folder = tmp_path_factory.mktemp("package")
    write_package(mini_flux, folder / "both", transformer="nf4", t5="nf4")
    write_t5(mini_flux / "text_encoder_2", folder / "t5", "int8")
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory, mini_flux):
    """The pipeline without the transformer's weights, and without T5."""
    folder = tmp_path_factory.mktemp("bare") / "flux"
    shutil.copytree(mini_flux, folder, ignore=shutil.ignore_patterns("text_encoder_2"))
    (folder / WEIGHTS).unlink()
    return folder


@pytest.fixture(scope="module")
def packaged_hub(tmp_path_factory, package, bare, mini_sd3):
    with hub_with_base(tmp_path_factory.mktemp("hub"), bare) as to:
        for name, folder in (
            (PACKAGE, package / "both"),
            (LOOSE_T5, package / "t5"),
            ("we/sd3", mini_sd3),
            ("we/clip", bare / "text_encoder"),
        ):
            to.store.add(Repository.of_folder(name, folder))
        to.store.add(Repository.of_folder(GATED, package / "both", gated=True))
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


def assert_same(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_trains_as_on_a_pipeline_with_these_parts(trained, package, bare, tmp_path):
    run, _ = trained
    assert_same(run / WEIGHTS, package / "both" / WEIGHTS)
    whole = shutil.copytree(bare, tmp_path / "whole")
    shutil.copytree(package / "both", whole, dirs_exist_ok=True)
    alone = run_here(write_recipe(tmp_path, whole), *QUICK)
    assert losses(run) == losses(alone)
    assert_same(run / ADAPTER, alone / ADAPTER)


def test_a_quantized_t5_makes_other_embeddings_than_a_plain_one(trained, package, mini_flux, tmp_path):
    """That what is compared above is the package's T5 at all."""
    own = (f"model.transformer={package / 'both'}",)
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


def halved(content):
    tensors = load(content)
    return save({n: t / 2 if n.endswith("norm.weight") else t for n, t in tensors.items()}, {"format": "pt"})


def test_a_run_resumes_on_the_commits_that_it_was_started_on(calm, trained):
    train(calm, *QUICK, *BOTH, "train.steps=2", name="killed")
    repository = calm.store.model(PACKAGE)
    began_on = repository.head
    changed = {T5_WEIGHTS: Blob(halved(repository.tree[T5_WEIGHTS].content), large=True)}
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
        assert_same(trained[0] / ADAPTER, calm.folder / "killed" / ADAPTER)
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


def test_a_plain_t5_in_several_files_is_the_pipelines(calm, mini_flux, package, tmp_path):
    t5 = T5EncoderModel.from_pretrained(mini_flux / "text_encoder_2", dtype=torch.bfloat16)
    t5.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-0*.safetensors"))) > 1
    calm.store.add(Repository.of_folder("we/sharded", tmp_path / "sharded"))
    quick = (*QUICK, "train.steps=1", f"model.transformer={package / 'both'}")
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


def test_a_package_in_model_path_is_told_what_to_write(calm, package):
    for named, told in (
        (
            PACKAGE,
            f"write model.transformer: {PACKAGE} and model.text_encoder: {PACKAGE}, and as model.path the",
        ),
        (LOOSE_T5, f"write model.text_encoder: {LOOSE_T5}, and as model.path the"),
        (package / "both", f"and model.text_encoder: {package / 'both'}, and as model.path the"),
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


def test_a_revision_must_be_one(write: Write):
    for field in ("model.transformer", "model.text_encoder", "lora.init_from"):
        (problem,) = problems(write(SMALL), f"{field}=ann/dog@")
        assert problem == (
            f"command line: {field}=ann/dog@: got 'ann/dog@', expected a branch, tag or commit behind the @, or"
            " owner/name alone"
        )
    for named in ("ann/dog", "ann/dog@v1.0", "ann/dog@refs/pr/2"):
        recipe = load_recipe(write(SMALL), [f"model.text_encoder={named}"])
        assert recipe.to_yaml().count(f"text_encoder: {named}\n") == 1
    (problem,) = problems(write(SMALL), "model.path=ann/dog@v1")
    assert problem.endswith("in front; write model.revision: v1")
    (problem,) = problems(write(SMALL), "model.text_encoder=../recipe.yaml")
    assert "expected a folder" in problem
    (problem,) = problems(write(SMALL), "model.text_encoder=./nothing")
    assert problem.endswith("; expected one, or a Hub repository as owner/name")


def settings(*overrides, recipe):
    return load_recipe(recipe, [*QUICK, "train.steps=1", "train.grad_accumulation=1", *overrides])


def test_local_packages_train_and_are_pinned(package, bare, tmp_path, monkeypatch):
    own = shutil.copytree(package / "both", tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, bare)
    named = ("model.transformer=./own", "model.text_encoder=./own")
    run = run_here(recipe, *QUICK, "train.steps=1", *named)
    assert_same(run / WEIGHTS, own / WEIGHTS)
    (own / T5_WEIGHTS).write_bytes(halved((own / T5_WEIGHTS).read_bytes()))
    for arguments in (("export", run), ("train", recipe, *QUICK, *named, "--resume")):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 2, done.output
        assert f"T5 is not what {run} was started on" in done.output
    (own / T5_WEIGHTS).unlink()
    done = CliRunner().invoke(app, ["export", str(run)])
    assert (
        f"model.text_encoder: {own / 'text_encoder_2'}: no weights, expected model.safetensors" in done.output
    )


def test_sd3_takes_a_t5_from_a_package_of_its_own(mini_sd3, tmp_path):
    bare = shutil.copytree(mini_sd3, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder_3"))
    write_t5(mini_sd3 / "text_encoder_3", tmp_path / "package" / "text_encoder_3", "nf4")
    with pytest.raises(RecipeError, match="lacks text_encoder_3"):
        SD3.open(str(bare), None, 24)
    whole = shutil.copytree(bare, tmp_path / "whole")
    shutil.copytree(tmp_path / "package", whole, dirs_exist_ok=True)
    embeddings = []
    for family in (SD3.open(str(bare), None, 24, None, tmp_path / "package"), SD3.open(str(whole), None, 24)):
        encoders = family.load_encoders(
            device=torch.device("cpu"), dtype=torch.bfloat16, memo=tmp_path / "memo"
        )
        embeddings.append(encoders.encode_texts(["a dog"]).prompt_embeds)
    assert torch.equal(*embeddings)
    (tmp_path / "package" / "text_encoder_3").rename(tmp_path / "package" / "other")
    (tmp_path / "package" / "model_index.json").write_text("{}")
    said = r"model\.text_encoder: .*has no component 'text_encoder_3'; it has other"
    with pytest.raises(RecipeError, match=said):
        SD3.open(str(bare), None, 24, None, tmp_path / "package")


def test_embeddings_are_kept_apart_by_the_t5_that_made_them(package, mini_flux, tmp_path):
    other = shutil.copytree(package / "t5", tmp_path / "other")
    (other / "model.safetensors").write_bytes(halved((other / "model.safetensors").read_bytes()))
    skewed = shutil.copytree(package / "t5", tmp_path / "skewed")
    config = json.loads((skewed / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    (skewed / "config.json").write_text(json.dumps(config))
    same = shutil.copytree(package / "t5", tmp_path / "same")

    def fingerprint(text_encoder, quant="auto"):
        family = Flux.open(str(mini_flux), None, 24, None, text_encoder)
        encoders = family.load_encoders(
            device=torch.device("cpu"), dtype=torch.bfloat16, memo=tmp_path / "memo", t5_quant=quant
        )
        return encoders.text_fingerprint

    sources = (None, package / "both", package / "t5", other, skewed)
    assert len({fingerprint(source) for source in sources}) == len(sources)
    # However it is asked for, it is held as it is stored.
    for quant in ("auto", "none", "int8", "nf4"):
        assert fingerprint(same, quant) == fingerprint(package / "t5")
    at = Flux.open(str(mini_flux), None, 24, None, package / "t5")
    prints = set()
    for revision in ("a" * 40, "b" * 40):
        at.t5 = replace(at.t5, name=LOOSE_T5, revision=revision)
        prints.add(at.text_fingerprint(FileDigests(tmp_path / "memo")))
    assert len(prints) == 2


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


def test_a_run_of_a_former_version_has_its_commit_still(tmp_path, bare, package):
    run = RunFolder(tmp_path)
    run.adapter.mkdir()
    run.pin.write_text(json.dumps({"revision": "a" * 40, "transformer": None, "rest": None}))
    recipe = load_recipe(
        write_recipe(tmp_path, bare), [f"model.transformer={package / 'both'}", "model.path=ann/dog"]
    )
    model = recipe.model.model_copy(update={"revision": "b" * 40})
    with pytest.raises(ValueError, match=f"model.revision: got {'b' * 40}, but .* on ann/dog at {'a' * 40}"):
        find_commits(run, model, None)


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
