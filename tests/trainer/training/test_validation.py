"""The validation loss: independent of the rest of the run, and without any effect on training."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.data.batches import TrainingSet
from halfbyte.trainer.data.cache.encodings import encode_missing
from halfbyte.trainer.data.held_out import set_aside
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import DataError, HalfbyteError
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.runtime.world import World, read_world
from halfbyte.trainer.training.metrics import read_metrics, read_validation
from halfbyte.trainer.training.validation import Validation

from runs import PICTURES, run_here, write_pictures, write_recipe

CPU = torch.device("cpu")
SIGMAS = (0.25, 0.5, 0.75)
ALONE = read_world({"ACCELERATE_USE_CPU": "true"})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, mini_flux):
    """A family, the views of six images, and a reader of their cache."""
    folder = tmp_path_factory.mktemp("validation")
    samples = read_samples(write_pictures(folder / "pictures"))
    family = Flux.open(str(mini_flux), None, 24)
    views = [group[0] for group in views_of(samples, [Cropping(64, family.size_multiple)], 0)]
    encoders = load_encoders(family, device=CPU, dtype=torch.bfloat16, memo=folder / "digests")
    caches = encode_missing(folder / "cache", encoders, views, [sample.caption for sample in samples])
    return family, views, TrainingSet(*caches)


@pytest.fixture(scope="module")
def denoiser(prepared):
    """The mini FLUX with an adapter that moves it and drops half of its inputs in training."""
    family, _, _ = prepared
    model = load_base(family, QuantRecipe(compute_dtype=torch.float32), device=CPU, dtype=torch.float32)
    targets = family.lora_targets("attention")
    add_lora(model, rank=4, alpha=4, dropout=0.5, targets=targets, init="gaussian", seed=0)
    draws = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=draws)
    return model.train()


def validation(prepared, denoiser, *, batch_size=4, world=ALONE, dtype=torch.float32, views=None):
    family, all_views, pictures = prepared
    return Validation(
        family,
        denoiser,
        all_views if views is None else views,
        pictures,
        sigmas=SIGMAS,
        guidance_scale=1.0,
        compute_dtype=dtype,
        batch_size=batch_size,
        world=world,
    )


def test_the_loss_is_the_squared_error_of_the_velocity_at_the_level(prepared, denoiser):
    """Checks one image at one level against the definition: x_t = (1 - sigma) x0 + sigma noise, target noise
    - x0."""
    family, views, pictures = prepared
    one = validation(prepared, denoiser, views=views[:1])
    measured = one.measure(7)
    mean = pictures._latents.read(views[0]).mean
    clean = (mean - family.vae_config["shift_factor"]) * family.vae_config["scaling_factor"]
    texts = pictures._texts.read(views[0].sample.caption)
    text = TextEmbedding(texts.prompt_embeds.float(), texts.pooled_prompt_embeds.float())
    losses = {}
    denoiser.eval()
    for point in one._batches[0]:
        noise = one._noise(point, clean.shape[1:])[None]
        noisy = (1 - point.sigma) * clean + point.sigma * noise
        with torch.no_grad():
            velocity = family.predict(denoiser, noisy, torch.tensor([point.sigma]), text, 1.0)
        losses[point.sigma] = F.mse_loss(velocity, noise - clean).item()
    denoiser.train()
    assert measured.step == 7
    assert dict(measured.by_sigma) == pytest.approx(losses, rel=1e-5)
    assert measured.loss == pytest.approx(sum(losses.values()) / 3, rel=1e-5)


def test_noise_is_standard_normal_and_differs_between_images_and_levels(prepared, denoiser):
    points = [point for batch in validation(prepared, denoiser)._batches for point in batch]
    noise = torch.stack([Validation._noise(point, torch.Size((16, 8, 8))).flatten() for point in points])
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    cosine = F.normalize(noise, dim=1) @ F.normalize(noise, dim=1).t()
    assert (cosine - torch.eye(len(points))).abs().max() < 0.15


def test_measuring_is_repeatable_and_keeps_mode_and_random_state(prepared, denoiser):
    measuring = validation(prepared, denoiser)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = measuring.measure(0), measuring.measure(0)
    assert first == second, "dropout is active"
    assert torch.get_rng_state().equal(state)
    assert all(module.training for module in denoiser.modules())
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    denoiser.eval()
    measuring.measure(0)
    assert not denoiser.training
    denoiser.train()


def test_processes_share_the_images_and_get_the_same_loss(prepared, denoiser, monkeypatch):
    alone = validation(prepared, denoiser).measure(0)
    parts = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda losses: parts.append(losses.clone()))
    ranks = []
    for rank in range(3):
        world = World(3, rank, 3, rank, CPU)
        ranks.append(validation(prepared, denoiser, world=world))
        ranks[-1].measure(0)
    together = torch.stack(parts)
    assert ((together != 0).sum(0) == 1).all(), "each image and level belongs to exactly one process"
    assert (together != 0).any(1).all(), "each process has work"
    assert together.sum(0).mean().item() == alone.loss


def test_the_loss_depends_on_the_adapter_and_not_on_the_batch(prepared, denoiser):
    before = validation(prepared, denoiser).measure(0).loss
    assert validation(prepared, denoiser, batch_size=1).measure(0).loss == pytest.approx(before, rel=1e-5)
    assert validation(prepared, denoiser, dtype=torch.bfloat16).measure(0).loss == pytest.approx(
        before, rel=2e-2
    )
    parameter = next(p for name, p in trained_parameters(denoiser).items() if ".lora_B." in name)
    kept = parameter.data.clone()
    parameter.data *= 3
    assert validation(prepared, denoiser).measure(0).loss != before
    parameter.data = kept


def test_a_nan_loss_is_an_error(prepared, denoiser):
    parameter = next(iter(trained_parameters(denoiser).values()))
    kept = parameter.data.clone()
    parameter.data[0, 0] = float("nan")
    with pytest.raises(HalfbyteError, match=r"step 12: .*nan"):
        validation(prepared, denoiser).measure(12)
    parameter.data = kept


def test_images_are_held_out_by_their_contents(tmp_path):
    samples = read_samples(write_pictures(tmp_path / "pictures"))
    (train,), (held,) = set_aside([samples], 2)
    assert (len(train), len(held)) == (PICTURES - 2, 2)
    assert max(sample.sha256 for sample in held) < min(sample.sha256 for sample in train)
    source = held[0].path
    shutil.copy(source, source.with_name("zz.png"))
    shutil.copy(source.with_suffix(".txt"), source.with_name("zz.txt"))
    (again,), (held_again,) = set_aside([read_samples(tmp_path / "pictures")], 2)
    assert len(again) == PICTURES - 2
    assert sorted(s.path.name for s in held_again) == sorted([*(s.path.name for s in held), "zz.png"])
    assert set_aside([samples], 0) == ([samples], [[]])
    with pytest.raises(DataError, match=r"validation\.held_out: got 6\b.*\b5\b"):
        set_aside([samples], PICTURES)


HELD_OUT = ("validation.held_out=2", "validation.every=2")


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("measured")
    return run_here(write_recipe(folder, mini_flux), *HELD_OUT, "lora.dropout=0.1")


def test_a_run_reports_its_validation_loss(measured_run):
    rows = read_validation(measured_run / "validation.csv")
    assert [row.step for row in rows] == [0, 2, 4]
    assert rows[0].loss > rows[-1].loss, "training the toy model lowers the validation loss"
    for row in rows:
        assert list(row.by_sigma) == [0.1, 0.3, 0.5, 0.7, 0.9]
        assert row.loss == pytest.approx(sum(row.by_sigma.values()) / 5)
    steps = read_metrics(measured_run / "metrics.csv")
    assert [row.validation_loss for row in steps] == [None, rows[1].loss, None, rows[2].loss]
    summary = json.loads((measured_run / "summary.json").read_text())["validation"]
    change = 100 * (rows[-1].loss / rows[0].loss - 1)
    assert summary["pictures"] == 2
    assert (summary["base"], summary["trained"]) == (rows[0].loss, rows[-1].loss)
    assert summary["change_percent"] == pytest.approx(change)
    assert [entry["sigma"] for entry in summary["by_sigma"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert summary["by_sigma"][2]["trained"] == rows[-1].by_sigma[0.5]


def test_held_out_images_are_not_trained_on(measured_run, mini_flux, tmp_path):
    """Moving them out of the folder by hand gives the same training."""
    recipe = write_recipe(tmp_path, mini_flux)
    _, (held,) = set_aside([read_samples(tmp_path / "pictures")], 2)
    (tmp_path / "apart").mkdir()
    for sample in held:
        shutil.move(sample.path, tmp_path / "apart" / sample.path.name)
        shutil.move(sample.path.with_suffix(".txt"), tmp_path / "apart" / f"{sample.path.stem}.txt")
    folder = run_here(recipe, "validation.path=" + str(tmp_path / "apart"), "lora.dropout=0.1")
    assert_same_training(measured_run, folder)
    mine, theirs = (read_validation(run / "validation.csv") for run in (folder, measured_run))
    assert [row.step for row in mine] == [0, 4]
    assert mine[0] == theirs[0]
    assert mine[-1] == theirs[-1]


def test_validation_does_not_change_training(measured_run, mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    for sample in set_aside([read_samples(tmp_path / "pictures")], 2)[1][0]:
        sample.path.unlink()
        sample.path.with_suffix(".txt").unlink()
    folder = run_here(recipe, "lora.dropout=0.1")
    assert_same_training(measured_run, folder)
    assert not (folder / "validation.csv").exists()


def assert_same_training(one, other):
    first, second = (read_metrics(run / "metrics.csv") for run in (one, other))
    assert [(r.step, r.loss, r.grad_norm) for r in first] == [(r.step, r.loss, r.grad_norm) for r in second]
    left, right = (load_file(run / "adapter" / ADAPTER_FILE) for run in (one, other))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def test_resuming_keeps_step_0_and_repeats_the_rest_bitwise(measured_run, mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    run_here(recipe, *HELD_OUT, "lora.dropout=0.1", "train.steps=2")
    with (tmp_path / "run" / "validation.csv").open("a") as stream:
        stream.write("3,9,9,9,9,9,9\n")  # a row of a step that the crash lost
    folder = run_here(recipe, *HELD_OUT, "lora.dropout=0.1", resume=True)
    assert read_validation(folder / "validation.csv") == read_validation(measured_run / "validation.csv")
    assert_same_training(measured_run, folder)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (measured_run, folder))
    assert one["validation"] == other["validation"]


def test_two_processes_measure_the_same_as_one(server, mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    settings = (*HELD_OUT, "train.steps=2", "sample.prompts=[]", "output.export_base=false")
    processes = server.start_ranks(2, "train", str(recipe), *settings)
    assert [process.wait() for process in processes] == [0, 0], processes[0].errors
    assert "validation" in processes[0].output
    alone = run_here(recipe, *settings, "train.batch_size=2", f"output.dir={tmp_path / 'alone'}", world=ALONE)
    pair, one = (read_validation(run / "validation.csv") for run in (tmp_path / "run", alone))
    assert [row.loss for row in pair] == pytest.approx([row.loss for row in one], rel=1e-5)


def test_an_image_in_both_folders_is_refused(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    shutil.copytree(tmp_path / "pictures", tmp_path / "apart")
    with pytest.raises(DataError, match=r"apart/picture0\.png: .*validation\.path.*picture0"):
        run_here(recipe, f"validation.path={tmp_path / 'apart'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        (["validation.every=5"], "validation.every"),
        (["validation.held_out=2", "validation.path=."], "validation.held_out"),
        (["validation.held_out=2", "validation.sigmas=[0.5, 0.5]"], "validation.sigmas"),
        (["validation.held_out=2", "validation.sigmas=[0.5, 1.5]"], "validation.sigmas"),
        (["validation.held_out=2", "validation.sigmas=[]"], "validation.sigmas"),
        (["validation.path=./nowhere"], "nowhere"),
        (["validation.held_out=-1"], "validation.held_out"),
    ],
)
def test_mistakes_in_the_section_are_named(mini_flux, tmp_path, settings, setting):
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(HalfbyteError, match=setting.replace(".", r"\.")):
        run_here(recipe, *settings)
    assert not (tmp_path / "run").exists()


def test_the_columns_of_validation_csv_are_the_noise_levels(measured_run):
    with (measured_run / "validation.csv").open() as stream:
        assert next(csv.reader(stream)) == ["step", "loss", "0.1", "0.3", "0.5", "0.7", "0.9"]
