"""Runs in two processes: each sample once per epoch, one adapter on both, one process that writes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.training.metrics import read_metrics

from repository import ROOT
from runs import PICTURES, command, run_here, write_recipe

LAUNCHER = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
)


# Two sizes of each image, with other numbers of them in a micro-batch.
SIZES = "data.resolution=[32, 64]"
PAIR, ALONE = "train.batch_size={32: 2, 64: 1}", "train.batch_size={32: 4, 64: 2}"


def assert_same_as_one_process(recipe, pair, alone):
    """Checks that two processes trained like one process with batches of twice the size."""
    one = run_here(recipe, SIZES, ALONE, "sample.prompts=[]", f"output.dir={alone}")
    first, second = ([row.loss for row in read_metrics(run / "metrics.csv")] for run in (one, pair))
    assert second == pytest.approx(first, rel=1e-4)
    ours, theirs = (load_file(run / "adapter" / ADAPTER_FILE) for run in (one, pair))
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-3), name


def test_accelerate_launch_trains_two_processes_as_one(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    result = command(*LAUNCHER, "-m", "halfbyte.trainer", str(recipe), SIZES, PAIR)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == 1, "only one process prints"
    assert_same_as_one_process(recipe, tmp_path / "run", tmp_path / "alone")
    # One process continues what two began.
    settings = (SIZES, ALONE, "train.steps=6", "sample.prompts=[]")
    for run in ("run", "alone"):
        run_here(recipe, *settings, f"output.dir={tmp_path / run}", resume=True)
    pair, one = (
        [row.loss for row in read_metrics(tmp_path / run / "metrics.csv")] for run in ("run", "alone")
    )
    assert len(pair) == 6
    assert pair == pytest.approx(one, rel=1e-4)


OBSERVED = """
import hashlib, json, sys
from functools import partial
from pathlib import Path
from halfbyte.trainer import run
from halfbyte.trainer.training import loop, module
from halfbyte.trainer.adapters.lora import adapter_state

folder, fakes = {folder!r}, {fakes!r}
recorders = None
if fakes:
    sys.path.insert(0, fakes)
    from fake_recorders import Recorders, Tape
    recorders = Recorders(Tape)
    loop.records_graphs = lambda recipe, world: True
    loop.GraphedDenoiser = partial(loop.GraphedDenoiser, recorder=recorders)
seen, modules = [], set()
loss, train = module.DiffusionModule.loss, run.run

def observed(self, batch):
    seen.extend(batch.positions)
    modules.add(self)
    return loss(self, batch)

def reported(recipe, world, **options):
    finished = train(recipe, world, **options)
    (trained,) = modules
    tensors = adapter_state(trained.denoiser).items()
    digests = {{n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors}}
    replayed = recorders.counts if recorders else None
    Path(folder, f"rank{{world.rank}}.json").write_text(json.dumps([seen, digests, replayed]))
    return finished

module.DiffusionModule.loss = observed
run.run = reported
"""


def observed(server, folder, mini_flux, *, fakes=""):
    """Returns, per process: the sample positions seen, the adapter's digests, and counts of recordings and replays."""
    folder.mkdir()
    # Exporting the base would remove the adapters. Streamed blocks are kept apart from the parameters that DDP shares.
    settings = [f"train.steps={PICTURES // 2}", "train.grad_accumulation=1", "output.export_base=false"]
    settings += ["ema.decay=0.9"] + ([] if fakes else ["train.stream_blocks=true"])
    before = OBSERVED.format(folder=str(folder), fakes=str(fakes))
    recipe = write_recipe(folder, mini_flux)
    for process in server.start_ranks(2, "train", str(recipe), *settings, before=before):
        assert process.wait() == 0, process.errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_see_every_sample_once_per_epoch_and_train_one_adapter(server, tmp_path, mini_flux):
    (seen, adapter, _), (seen_too, adapter_too, _) = observed(server, tmp_path / "plain", mini_flux)
    # Positions 0 to 5 are the first epoch; the tests of the sample order check that each is another image. The
    # digests are those of the weights' average, which must agree as well.
    assert sorted(seen + seen_too) == list(range(PICTURES))
    assert len(seen) == len(seen_too)
    assert adapter == adapter_too
    # Recorded steps reduce their gradients over both processes as eager steps do.
    recorded = observed(server, tmp_path / "recorded", mini_flux, fakes=ROOT / "tests" / "support")
    for (_, digests, (made, replays)), positions in zip(recorded, (seen, seen_too), strict=True):
        assert digests == adapter
        assert made
        assert replays >= len(positions)


def test_accelerate_launch_on_cpu_without_multi_gpu_is_refused(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    result = command(*launch, "-m", "halfbyte.trainer", str(recipe))
    assert result.returncode != 0
    assert "--multi_gpu" in result.stderr
    assert not (tmp_path / "run").exists()
