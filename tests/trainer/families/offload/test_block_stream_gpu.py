"""Block streaming on a GPU: results do not change, however slow the copies or the kernels are."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.load import load_denoiser
from halfbyte.trainer.denoiser.settings import block_names
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.offload.activations import HostStore
from halfbyte.trainer.families.offload.block_stream import BlockStream, packed_blocks
from halfbyte.trainer.families.offload.copies import CudaCopies, Mark
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.plan.dry_run import DryRun
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.host_memory import PageLocked
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training import loop
from halfbyte.trainer.training.module import training_module

from runs import write_recipe
from steps import batch_for, module_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
_CYCLES = 1_000_000  # half a millisecond, longer than any of these blocks computes
_LONG = 40_000_000  # longer than a busy machine needs between the launches of two blocks
MIB = 2**20


class SlowCopies(CudaCopies):
    """Every copy starts late: a kernel that does not wait for it reads the previous weights."""

    cycles = _CYCLES

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(self.cycles)
        return super().copy(source, target, after)


class SlowWork(CudaCopies):
    """Every visit computes late: a copy that does not wait for it overwrites weights in use."""

    cycles = _CYCLES

    def wait(self, arrived: Mark) -> None:
        super().wait(arrived)
        torch.cuda._sleep(self.cycles)


class Unawaited(SlowCopies):
    """Broken: kernels do not wait for a copy."""

    cycles = _LONG

    def wait(self, arrived: Mark) -> None:
        pass


class Unmarked(SlowWork):
    """Broken: copies do not wait for kernels."""

    cycles = _LONG

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        return super().copy(source, target, None)


def loaded(
    family: Family, settings: BlockSettings, copies: Callable[[torch.device], CudaCopies] | None
) -> nn.Module:
    """Loads a denoiser to the GPU, all at once or with its blocks streamed through `copies`."""
    recipe = QuantRecipe(compute_dtype=torch.bfloat16)
    denoiser = load_base(family, recipe, device=CUDA, dtype=torch.bfloat16, stream=copies is not None)
    targets = family.lora_targets("all-linear")
    add_lora(denoiser, rank=4, alpha=8, dropout=0.0, targets=targets, init="gaussian", seed=1)
    family.fuse_blocks(denoiser, settings)
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    denoiser.to(CUDA)
    if copies is not None:
        BlockStream(packed_blocks(denoiser, block_names(family)), copies(CUDA))
    return denoiser.train()


def steps(family: Family, denoiser: nn.Module) -> list[Tensor]:
    """Returns losses and gradients of two steps of two micro-batches, and a prediction after each step."""
    module = module_of(family, denoiser, torch.bfloat16)
    parameters = list(trained_parameters(denoiser).values())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    found = []
    for step in range(2):
        for micro in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = module.loss(batch_for(family, (4 * step + micro, 7)).to(CUDA))
            loss.backward()
            found.append(loss.detach())
        found += [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found.append(module.loss(batch_for(family).to(CUDA)))
    return [tensor.cpu() for tensor in found]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


_REPEATS = "deterministic"
SETTINGS = {
    "full": lambda: BlockSettings("inputs", backend=_REPEATS),
    "offload": lambda: BlockSettings("inputs", store=HostStore(), backend=_REPEATS),
    "selective": lambda: BlockSettings("attention", backend=_REPEATS),
    "none": lambda: BlockSettings("everything", backend=_REPEATS),
    "full by layer": lambda: BlockSettings("inputs", whole=False, backend=_REPEATS),
    "none by layer": lambda: BlockSettings("everything", whole=False, backend=_REPEATS),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
def test_streamed_steps_are_bitwise_identical(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str, name: str
) -> None:
    family = family_class.open(str(request.getfixturevalue(fixture)), None, 24)
    expected = steps(family, loaded(family, SETTINGS[name](), None))
    if not equal(steps(family, loaded(family, SETTINGS[name](), None)), expected):
        pytest.skip("without streaming, a repeated step is not bitwise identical on this device")
    for copies in (CudaCopies, SlowCopies, SlowWork):
        assert equal(steps(family, loaded(family, SETTINGS[name](), copies)), expected), copies.__name__


@pytest.mark.parametrize("broken", [Unawaited, Unmarked])
def test_missing_waits_give_wrong_results_with_slow_copies_or_kernels(
    mini_flux: Path, broken: type[CudaCopies]
) -> None:
    family = Flux.open(str(mini_flux), None, 24)
    expected = steps(family, loaded(family, SETTINGS["full"](), None))
    assert not equal(steps(family, loaded(family, SETTINGS["full"](), broken)), expected)


def test_page_locked_memory_is_locked_until_it_is_dropped() -> None:
    for nbytes in (1, 4096, 3 * MIB + 5):
        memory = PageLocked(nbytes, CUDA, "")
        assert memory.bytes.is_pinned()
        assert memory.bytes.shape == (nbytes,)
        memory.bytes.fill_(7)
        assert bool((memory.bytes.to(CUDA, non_blocking=True) == 7).all())
        place = memory.bytes.data_ptr()
        kept = memory.bytes
        del memory
        gc.collect()
        assert kept.data_ptr() == place
        assert not kept.is_pinned()


@pytest.fixture(scope="module")
def large_flux(mini_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's pipeline with a transformer of 34 MiB (packed), so that rounding is negligible."""
    folder = tmp_path_factory.mktemp("large") / "flux"
    shutil.copytree(mini_flux, folder, ignore=shutil.ignore_patterns("transformer"))
    config = FluxTransformer2DModel.load_config(mini_flux / "transformer")
    sizes = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, "attention_head_dim": 64}
    axes = {"axes_dims_rope": (16, 24, 24)}
    model: Any = FluxTransformer2DModel.from_config({**config, **sizes, **axes})
    model.bfloat16().save_pretrained(folder / "transformer")
    return folder


def held_and_peak(recipe: Recipe, family: Family) -> tuple[int, int]:
    """Returns the bytes of the loaded model, and the peak of a second step."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    denoiser = load_denoiser(recipe, family, read_world({}), Console(quiet=True)).denoiser.train()
    denoiser.to(CUDA)
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    module = training_module(recipe, family, denoiser, torch.bfloat16)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.loss(batch_for(family).to(CUDA))
        module.zero_grad()
        loss.backward()
        torch.cuda.synchronize()
    return held, torch.cuda.max_memory_allocated() - before


def test_streaming_saves_the_memory_that_the_plan_predicts(large_flux: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, large_flux)
    measured, predicted = [], []
    # The libraries' workspaces stay allocated; the first round creates them.
    for streamed in ("false", "false", "true"):
        settings = [
            f"train.stream_blocks={streamed}",
            "quant.compute_dtype=bfloat16",
            "train.batch_size=2",
            "train.grad_accumulation=1",
            "train.attention=flash",
            "model.cache_base=false",
        ]
        recipe = load_recipe(file, settings)
        family = Flux.open(str(large_flux), None, 24)
        measured.append(held_and_peak(recipe, family))
        dry_run = DryRun(recipe, family)
        predicted.append((sum(dry_run.held.values()), dry_run.step(recipe, 64, 64).peak.nbytes))
    assert dry_run.visitors.host_bytes > 30 * MIB
    for place in (0, 1):
        saved = predicted[1][place] - predicted[2][place]
        assert saved > 0.5 * dry_run.visitors.host_bytes
        assert measured[1][place] - measured[2][place] == pytest.approx(saved, rel=0.1)


def test_a_run_on_the_gpu_streams_from_loading_to_export(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sample images, validation, an export with its self-check, and a streamed T5."""
    devices: dict[str, list[str]] = {}
    train = loop.train

    def noted(training: loop.Training) -> loop.Finished:
        finished = train(training)
        denoiser = training.denoiser
        blocks = packed_blocks(denoiser, block_names(training.family))
        layers = [[part for part in block.modules() if isinstance(part, QuantizedLayer)] for block in blocks]
        devices["packed"] = sorted(
            "+".join({layer.weight.device.type for layer in block}) for block in layers
        )
        devices["adapters"] = sorted({p.device.type for p in trained_parameters(denoiser).values()})
        return finished

    monkeypatch.setattr("halfbyte.trainer.run.train", noted)
    recipe = load_recipe(
        write_recipe(tmp_path, mini_flux),
        [
            "quant.compute_dtype=bfloat16",
            "train.stream_blocks=true",
            "model.stream_text_encoder=true",
            "model.text_encoder_quant=int8",
            "validation.held_out=1",
            "output.self_check=true",
        ],
    )
    assert run(recipe, read_world({}), console=Console(quiet=True), resume=False)
    # The block of the last visit is still on the device.
    assert devices == {"packed": ["cpu"] * 2 + ["cuda"], "adapters": ["cuda"]}
    assert len(list((recipe.output.dir / "samples").glob("step-*.png"))) == 2
