"""Training steps as CUDA graphs: bitwise identical to plain steps; memory is freed afterwards.

If a comparison fails, the message says what differs and by how much.
"""

import gc
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.cuda_graphs.denoiser import GraphedDenoiser
from halfbyte.trainer.cuda_graphs.warm_up import warm_up
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.families.blocks.fused_block import BlockSettings, Keep
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.optim.averages import Ema, OptimizerAverage, TrainedWeights
from halfbyte.trainer.optim.optimizers import OPTIMIZERS
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.preservation import Preservation

from device_memory import hands_blocks_back, reserved
from runs import write_recipe
from steps import batch_for, module_of, text_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FAMILIES = pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
Named = list[tuple[str, Tensor]]


def loaded(family: Family, keep: Keep, dtype: torch.dtype, *, packed: bool = True) -> nn.Module:
    recipe = QuantRecipe(compute_dtype=dtype) if packed else None
    denoiser = load_base(family, recipe, device=CUDA, dtype=dtype)
    targets = family.lora_targets("all-linear")
    add_lora(denoiser, rank=4, alpha=8, dropout=0.0, targets=targets, init="gaussian", seed=1)
    family.fuse_blocks(denoiser, BlockSettings(keep, backend="deterministic"))
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    return denoiser.to(CUDA).train()


def batch(family: Family, number: int, side: int) -> Batch:
    """Returns a batch of two images of 8 x side latent pixels."""
    text = batch_for(family, (2 * number, 2 * number + 1))
    mean = torch.randn(2, 16, 8, side, generator=torch.Generator().manual_seed(number))
    return Batch(text.positions, mean, mean.abs() * 0.1, text.prompt_embeds, text.pooled_prompt_embeds).to(
        CUDA
    )


class Steps:
    """Takes optimizer steps of several micro-batches and collects all their results."""

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        *,
        graphs: bool,
        optimizer: str = "adamw",
        dtype: torch.dtype = torch.bfloat16,
        ema: bool = False,
        preserve: bool = False,
    ) -> None:
        self.family, self.denoiser, self.dtype = family, denoiser, dtype
        self.module = module_of(family, denoiser, dtype)
        if preserve:
            self.module.preserve = Preservation(text_of(family, 3), 0.5)
        self.graphed = GraphedDenoiser(denoiser)
        if graphs:
            self.module.forward_fn = self.graphed
        self.parameters = trained_parameters(denoiser)
        choice = OPTIMIZERS[optimizer].model_validate({"name": optimizer})
        self.optimizer = choice.build(list(self.parameters.items()))
        self.weights: TrainedWeights = Ema(self.parameters, decay=0.5) if ema else TrainedWeights()
        if choice.averages:
            self.weights = OptimizerAverage(self.parameters, self.optimizer)

    def loss(self, number: int, side: int) -> Tensor:
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            return self.module.loss(batch(self.family, number, side))

    def take(self, sides: Sequence[int], *, micro: int = 1, first: int = 0, validate: bool = False) -> Named:
        """Runs one micro-batch per side and returns all results, each with a name that says its origin."""
        found: Named = []
        for number, side in enumerate(sides, first):
            loss = self.loss(number, side)
            loss.backward()
            found.append((f"loss of micro-batch {number}, side {side}", loss.detach().clone()))
            if (number + 1) % micro:
                continue
            for name, parameter in self.parameters.items():
                assert parameter.grad is not None, f"micro-batch {number}: {name} has no gradient"
                found.append((f"gradient after micro-batch {number}: {name}", parameter.grad.clone()))
            nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.weights.update(number + 1)
            if validate:
                self.denoiser.eval()
                with self.weights.swapped_in(), torch.no_grad():
                    found.append((f"validation after {number}", self.loss(1000, side)))
                self.denoiser.train()
        return found + [(f"weight: {name}", p.detach().clone()) for name, p in self.parameters.items()]


def difference(ours: Named, theirs: Named) -> str:
    """Returns "" if all results are bitwise identical; else how many differ, the first, and the largest."""
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    wrong = []
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        if not torch.equal(one, other):
            scale = other.float().abs().max().item()
            wrong.append((name, (one.float() - other.float()).abs().max().item(), scale))
    if not wrong:
        return ""
    worst = max(wrong, key=lambda entry: entry[1] / (entry[2] or 1.0))
    return (
        f"{len(wrong)} of {len(ours)} differ; first {wrong[0][0]}: {wrong[0][1]:.3g} of {wrong[0][2]:.3g};"
        f" worst {worst[0]}: {worst[1]:.3g} of {worst[2]:.3g}"
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the log lines about graphs that could not be recorded."""
    return [record.getMessage() for record in caplog.records if "cuda_graphs" in record.getMessage()]


def compared(make: Callable[[bool], Named], caplog: pytest.LogCaptureFixture) -> None:
    """Compares `make` with graphs and without; skips if two runs without graphs already differ."""
    expected = make(False)
    again = difference(make(False), expected)
    if again:
        pytest.skip(f"without graphs a repeat is not the same here: {again}")
    ours = make(True)
    assert warnings(caplog) == []
    assert difference(ours, expected) == ""


@FAMILIES
@pytest.mark.parametrize("keep", ["everything", "attention", "inputs"])
@pytest.mark.parametrize("micro", [1, 2])
def test_graphs_equal_single_launches(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    family_class: type[Family],
    fixture: str,
    keep: Keep,
    micro: int,
) -> None:
    """Two sizes in turn, with validation without gradients in between."""
    family = family_class.open(str(request.getfixturevalue(fixture)), None, 24)

    def make(graphs: bool) -> Named:
        steps = Steps(family, loaded(family, keep, torch.bfloat16), graphs=graphs)
        found = steps.take([8, 12] * 5, micro=micro, validate=True)
        assert steps.graphed.shapes == (2 if graphs else 0)
        return found

    compared(make, caplog)


@FAMILIES
def test_preservation_with_graphs(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    family_class: type[Family],
    fixture: str,
) -> None:
    """The base is computed without graphs, with the adapters switched off between recorded forwards."""
    family = family_class.open(str(request.getfixturevalue(fixture)), None, 24)

    def make(graphs: bool) -> Named:
        denoiser = loaded(family, "inputs", torch.bfloat16)
        steps = Steps(family, denoiser, graphs=graphs, preserve=True)
        found = steps.take([8, 12] * 4, micro=2)
        assert steps.graphed.shapes == (2 if graphs else 0)
        return found

    compared(make, caplog)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.classes))
def test_every_optimizer_and_average_with_graphs(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, optimizer: str
) -> None:
    family = Flux.open(str(mini_flux), None, 24)

    def make(graphs: bool) -> Named:
        denoiser = loaded(family, "inputs", torch.bfloat16)
        steps = Steps(family, denoiser, graphs=graphs, optimizer=optimizer, ema=optimizer == "adamw")
        return steps.take([8] * 5, validate=True)

    compared(make, caplog)


@pytest.mark.parametrize(
    ("dtype", "packed"), [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)]
)
def test_other_types_and_bases(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, packed: bool
) -> None:
    family = Flux.open(str(mini_flux), None, 24)

    def make(graphs: bool) -> Named:
        return Steps(
            family, loaded(family, "attention", dtype, packed=packed), graphs=graphs, dtype=dtype
        ).take([8] * 4)

    compared(make, caplog)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_other_attention_is_recorded_too(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    """These backends sum their backward in no fixed order, so results are close but not identical."""
    family = Flux.open(str(mini_flux), None, 24)
    found = []
    for graphs in (False, True):
        denoiser = loaded(family, "inputs", torch.bfloat16)
        family.fuse_blocks(denoiser, BlockSettings("inputs", backend=backend))
        steps = Steps(family, denoiser, graphs=graphs)
        try:
            found.append(steps.take([8] * 4))
        except RuntimeError as error:
            if graphs:
                raise
            pytest.skip(f"{backend} does not run here at this size: {error}")
        assert steps.graphed.shapes == graphs
    assert warnings(caplog) == []
    for (name, plain), (_, graphed) in zip(*found, strict=True):
        error, scale = (plain - graphed).abs().max().item(), plain.abs().max().item()
        assert error <= 0.05 * scale + 1e-6, f"{name}: {error:.3g} of {scale:.3g}"


def test_a_resumed_run_equals_the_uninterrupted_one(
    mini_flux: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first step runs eagerly, or as a graph recorded at other addresses."""
    family = Flux.open(str(mini_flux), None, 24)

    def make(broken: bool) -> Named:
        steps = Steps(family, loaded(family, "inputs", torch.bfloat16), graphs=True)
        found = steps.take([8] * 3)
        if broken:
            steps.graphed.release()
            steps.graphed = steps.module.forward_fn = GraphedDenoiser(steps.denoiser)
        return found + steps.take([8] * 3, first=3)

    expected = make(False)
    assert difference(make(False), expected) == ""
    assert difference(make(True), expected) == ""
    assert warnings(caplog) == []


def test_a_warm_up_records_and_changes_nothing_else(mini_sd3: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = SD3.open(str(mini_sd3), None, 24)

    def make(graphs: bool) -> Named:
        steps = Steps(family, loaded(family, "inputs", torch.bfloat16), graphs=graphs)
        if graphs:
            text = batch_for(family)
            embedding = TextEmbedding(text.prompt_embeds.to(CUDA), text.pooled_prompt_embeds.to(CUDA))
            scale = family.vae_scale
            warm_up(
                steps.graphed,
                family,
                [
                    (len(text.positions), (8 * scale, 8 * scale)),
                    (len(text.positions), (12 * scale, 8 * scale)),
                ],
                embedding,
                guidance_scale=steps.module.objective.guidance_scale,
                compute_dtype=torch.bfloat16,
            )
            assert steps.graphed.works
            assert steps.graphed.shapes == 2
        found = steps.take([8, 12])
        assert steps.graphed.shapes == (2 if graphs else 0)
        return found

    compared(make, caplog)


def test_all_sizes_share_memory_that_is_freed_afterwards(mini_flux: Path) -> None:
    family = Flux.open(str(mini_flux), None, 24)
    steps = Steps(family, loaded(family, "everything", torch.bfloat16), graphs=True)

    steps.take([2048, 2048])
    steps.graphed.release()
    before = reserved()  # includes the libraries' workspaces, which stay
    steps.take([2048, 2048])
    one = reserved()
    steps.take([1536, 1536, 1024, 1024, 512, 512])
    four = reserved()
    assert steps.graphed.shapes == 4
    steps.graphed.release()
    after = reserved()
    sizes = [f"{size / 2**20:.0f} MiB" for size in (before, one, four, after)]
    assert one > before, sizes
    assert four - one < 0.7 * (one - before), sizes
    assert after <= before + 2**21, sizes


def test_steps_that_cannot_be_recorded_train_eagerly_with_one_warning(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward calls `.item()`, which breaks a recording; torch's leftovers are cleaned up."""
    family = Flux.open(str(mini_flux), None, 24)
    expected = Steps(family, loaded(family, "inputs", torch.bfloat16), graphs=False).take([8] * 4)
    denoiser = loaded(family, "inputs", torch.bfloat16)
    steps = Steps(family, denoiser, graphs=True)
    whole = type(denoiser.proj_out).forward

    def waits(self: Any, x: Tensor) -> Tensor:
        x.float().sum().item()
        return whole(self, x)

    gc.collect()
    torch.cuda.empty_cache()
    stream = torch.cuda.current_stream()
    monkeypatch.setattr(type(denoiser.proj_out), "forward", waits)
    found = steps.take([8] * 4)
    (line,) = warnings(caplog)
    assert line.startswith("train.cuda_graphs: ")
    assert torch.cuda.current_stream() == stream
    assert difference(found, expected) == "", line
    # The allocator still frees memory, and another model can be recorded.
    assert hands_blocks_back()
    monkeypatch.undo()
    caplog.clear()
    other = Steps(family, loaded(family, "inputs", torch.bfloat16), graphs=True)
    assert difference(other.take([8] * 4), expected) == ""
    assert other.graphed.shapes == 1, warnings(caplog)


@FAMILIES
def test_a_whole_run_with_graphs_equals_the_one_without(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family_class: type[Family],
    fixture: str,
) -> None:
    """With sample images, validation, and a run that ends and is resumed, all while graphs are in memory."""
    model = request.getfixturevalue(fixture)
    family = {Flux: "flux", SD3: "sd3"}[family_class]
    shared = [
        "quant.compute_dtype=bfloat16",
        "train.attention=deterministic",
        "validation.held_out=1",
        "validation.every=2",
        "sample.every=2",
        "model.text_encoder_quant=none",
    ]
    left = {}
    for name, settings in {
        "plain": [["train.steps=6"]],
        "again": [["train.steps=6"]],
        "graphs": [["train.steps=6", "train.cuda_graphs=true"]],
        "resumed": [
            ["train.steps=3", "train.cuda_graphs=true"],
            ["train.steps=6", "train.cuda_graphs=true"],
        ],
    }.items():
        file = write_recipe(tmp_path, model, family=family, name=name)
        for number, part in enumerate(settings):
            console = Console(record=True, width=200, file=io.StringIO())
            recipe = load_recipe(file, [*shared, *part])
            assert run(recipe, read_world({}), console=console, resume=number > 0)
            assert ("as CUDA graphs" in console.export_text()) == ("graphs=true" in part[-1])
        adapter = load_file(recipe.output.dir / "adapter" / ADAPTER_FILE)
        left[name] = sorted(adapter.items())
    assert warnings(caplog) == []
    repeat = difference(left["again"], left["plain"])
    if repeat:
        pytest.skip(f"without graphs a repeat is not the same here: {repeat}")
    assert difference(left["graphs"], left["plain"]) == ""
    assert difference(left["resumed"], left["plain"]) == ""
