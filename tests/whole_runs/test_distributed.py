"""Two processes: the right world, each sample once an epoch, one adapter, one writer."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.training.metrics import read_metrics

from repository import ROOT
from runs import PICTURES, command, run_here, write_recipe

LAUNCHERS = {
    "accelerate": (
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
}


def assert_as_alone(recipe, pair, alone):
    """Two processes of one picture did what one process of two does."""
    one = run_here(recipe, "train.batch_size=2", "sample.prompts=[]", f"output.dir={alone}")
    first, second = ([row.loss for row in read_metrics(run / "metrics.csv")] for run in (one, pair))
    assert second == pytest.approx(first, rel=1e-4)
    ours, theirs = (load_file(run / "adapter" / ADAPTER_FILE) for run in (one, pair))
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-3), name


def test_accelerate_launch_trains_two_processes_as_one(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    result = command(*LAUNCHERS["accelerate"], "-m", "halfbyte.trainer", str(recipe))
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout
    assert result.stdout.count("trained") == 1, "one process speaks"
    assert_as_alone(recipe, tmp_path / "run", tmp_path / "alone")


OBSERVED = """
import hashlib, json, sys
from functools import partial
from pathlib import Path
from halfbyte.trainer import fit, module, run
from halfbyte.trainer.adapters.lora import adapter_state
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.recipe.recipe import load_recipe
from rich.console import Console

recipe, folder, steps, fakes = sys.argv[1:]
recorders = None
if fakes:
    sys.path.insert(0, fakes)
    from fake_recorders import Recorders, Tape
    recorders = Recorders(Tape)
    fit.records_graphs = lambda recipe, world: True
    fit.GraphedDenoiser = partial(fit.GraphedDenoiser, recorder=recorders)
seen, modules = [], set()
loss = module.DiffusionModule.loss

def observed(self, batch):
    seen.extend(batch.positions)
    modules.add(self)
    return loss(self, batch)

module.DiffusionModule.loss = observed
world = read_world()
# The base's export takes the adapters off. Streamed blocks lie elsewhere than the parameters that are shared.
overrides = [f"train.steps={steps}", "train.grad_accumulation=1", "output.export_base=false", "ema.decay=0.9"]
overrides += [] if fakes else ["train.stream_blocks=true"]
run.run(load_recipe(recipe, overrides), world, console=Console(quiet=True), resume=False)
(trained,) = modules
digests = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in adapter_state(trained.denoiser).items()}
replayed = recorders.counts if recorders else None
Path(folder, f"rank{world.rank}.json").write_text(json.dumps([seen, digests, replayed]))
"""


def observed(folder, mini_flux, *, fakes=""):
    """For both processes: the positions they saw, the adapter's digests, and what was recorded and replayed."""
    folder.mkdir()
    script = folder / "observed.py"
    script.write_text(OBSERVED)
    recipe, steps = write_recipe(folder, mini_flux), PICTURES // 2
    result = command(*LAUNCHERS["torchrun"], str(script), str(recipe), str(folder), str(steps), str(fakes))
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_torchrun_every_sample_once_an_epoch_and_one_adapter(tmp_path, mini_flux):
    (seen, adapter, _), (seen_too, adapter_too, _) = observed(tmp_path / "plain", mini_flux)
    # Positions 0 to 5 are the first epoch; that each is another picture is the plan's own test. The model is left
    # with its average, which is one as well.
    assert sorted(seen + seen_too) == list(range(PICTURES))
    assert len(seen) == len(seen_too)
    assert adapter == adapter_too
    # Steps that are recorded hand over their gradients as others do.
    recorded = observed(tmp_path / "recorded", mini_flux, fakes=ROOT / "tests" / "support")
    for (_, digests, (made, replays)), positions in zip(recorded, (seen, seen_too), strict=True):
        assert digests == adapter
        assert made
        assert replays >= len(positions)


def test_accelerates_cpu_trap_ends_in_a_clear_error(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    result = command(*launch, "-m", "halfbyte.trainer", str(recipe))
    assert result.returncode != 0
    assert "--multi_gpu" in result.stderr
    assert not (tmp_path / "run").exists()
