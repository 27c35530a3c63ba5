"""A training run, from recipe to exported files: each stage needs only what the one before left."""

import logging
import shlex
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.adapters.lora import load_adapter_state
from halfbyte.trainer.data.prepare import Prepared, prepare
from halfbyte.trainer.data.size_limits import refuse_large
from halfbyte.trainer.denoiser.attention import AttentionChoice, AttentionShape, choose_attention
from halfbyte.trainer.denoiser.load import Loaded, load_denoiser, start_layers
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.errors import HubError, RecipeError
from halfbyte.trainer.export.export import ExportSettings, export_trained, exported_lines
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.plan.advice import oom_advice
from halfbyte.trainer.plan.dry_run import Rehearsal
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.publish.push import PushRequest, check_push, prepare_push, push
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.run_folder.folder import RunFolder, claim
from halfbyte.trainer.run_folder.pinned_base import (
    INIT_FROM,
    at_commit,
    find_commits,
    open_base,
    pin_base,
    started_from,
)
from halfbyte.trainer.runtime.progress import write_lines
from halfbyte.trainer.runtime.world import World, barrier, broadcast_from_leader, join
from halfbyte.trainer.sample.sampler import PictureSampler, SampleSettings
from halfbyte.trainer.training.loop import Finished, Training, train
from halfbyte.trainer.training.metrics import METRICS, StepMetrics, read_metrics
from halfbyte.trainer.training.opening import Opening, opening_lines
from halfbyte.trainer.training.outcome import Closing, closing_lines, what_was_learned, write_summary

log = logging.getLogger(__name__)

_ENCODING = ("encode texts", "encode pictures")
_WHEN_FULL_AT_THE_END = "behind the last step, whose checkpoint is whole; `halfbyte export` exports it"


def run(recipe: Recipe, world: World, *, console: Console, resume: bool) -> bool:
    """Trains and exports; True when the run is finished, False when it was interrupted and can be resumed.

    Raises HalfbyteError for everything a user can mend, before anything in `output.dir` is touched.
    """
    started = time.perf_counter()
    folder = RunFolder(recipe.output.dir)
    claim(folder, recipe, resume=resume)
    _check_precision(recipe, world)
    repository = recipe.output.push_to_hub
    if world.is_leader and repository is not None:
        check_push(repository)
    join(world)
    # One process asks, so that all read the same commits.
    init_from = recipe.lora.init_from
    commits = broadcast_from_leader(world, lambda: find_commits(folder, recipe.model, init_from))
    if init_from is not None:
        init_from = at_commit(init_from, commits.get(INIT_FROM))
    digests = FileDigests(recipe.data.cache_folder / "digests")
    family = open_base(folder, recipe.model, digests, commits=commits)
    refuse_large(recipe, family)
    when_full = partial(oom_advice, recipe, family)
    # What fits no layer, and a broken adapter, are told at once, not behind the encoding.
    Rehearsal(recipe, family)
    start = start_layers(init_from, family)
    with when_full("in encoding; what is encoded is kept", *_ENCODING):
        prepared = prepare(recipe, family, world, console)
    saved = _saved_state(folder, recipe, world) if resume else None

    attention = _attention(recipe, family, world, prepared)
    with when_full("in loading the transformer", "load and quantize"):
        loaded = load_denoiser(recipe, family, world, console, attention=attention.backend, start=start)
        del start
    denoiser = loaded.denoiser
    barrier(world)  # no process may find the folder of another one's start
    write_lines(console, opening_lines(_opening(recipe, family, world, loaded, prepared, attention)))
    sampler = PictureSampler(
        family,
        denoiser,
        prepared.prompts,
        prepared.empty,
        _sample_settings(recipe),
        folder=folder.samples,
        device=world.device,
        dtype=DTYPES[recipe.quant.compute_dtype],
    )
    if world.is_leader:
        folder.root.mkdir(parents=True, exist_ok=True)
        write_file(folder.recipe, recipe.to_yaml())
        # Here the base has been read, and its digests are known.
        pin_base(folder, family, digests, commits)
        if saved is None:
            with when_full("in drawing the first pictures", *_drawing(recipe)):
                sampler.draw(0)
    barrier(world)
    if saved is not None:
        load_adapter_state(denoiser, saved.adapter)
        console.print(f"resuming at step {saved.position.step} from {saved.folder}", highlight=False)
    ready = time.perf_counter() - started
    console.print(f"ready after {ready:.1f} s", highlight=False)

    training = Training(recipe, family, world, prepared, denoiser, folder, saved, sampler, console, when_full)
    finished = train(training)
    if not finished.done:
        console.print(
            f"stopped at step {finished.step} of {recipe.train.steps}; go on with --resume", highlight=False
        )
        return False
    if world.is_leader:
        with when_full(_WHEN_FULL_AT_THE_END, *_drawing(recipe)):
            _export(training, loaded, finished)
    barrier(world)
    # After the last wait for each other: no process waits for an upload.
    if world.is_leader and repository is not None:
        _push(folder.root, console)
    return True


def _drawing(recipe: Recipe) -> tuple[str, ...]:
    """The phases of the plan behind and ahead of the steps."""
    return ("sample", "export") if recipe.sample.prompts else ("export",)


def _push(run: Path, console: Console) -> None:
    try:
        push(prepare_push(PushRequest(run)), console)
    except HubError as error:
        again = f"halfbyte push {shlex.quote(str(run))}"
        raise HubError(f"{error}\nThe run is finished and whole in {run}; push it again: {again}") from error


def _attention(recipe: Recipe, family: Family, world: World, prepared: Prepared) -> AttentionChoice:
    """Chosen at the largest size of the run; one process of each machine probes, the others find its result."""
    tokens = max(
        family.image_tokens(height // family.vae_scale, width // family.vae_scale)
        for width, height in prepared.sizes
    )
    shape = AttentionShape(
        tokens + family.text_tokens, *family.attention_heads, DTYPES[recipe.quant.compute_dtype]
    )
    if world.local_rank != 0:
        barrier(world)
    choice = choose_attention(recipe.train.attention, shape, world.device, recipe.data.cache_folder)
    if world.local_rank == 0:
        barrier(world)
    return choice


def _check_precision(recipe: Recipe, world: World) -> None:
    if recipe.quant.compute_dtype == "float16" and world.device.type == "cpu":
        raise RecipeError(
            "quant.compute_dtype: float16 needs a CUDA device, and this run is on the CPU; use bfloat16 or float32"
        )


def _saved_state(folder: RunFolder, recipe: Recipe, world: World) -> checkpoint.Checkpoint | None:
    saved = checkpoint.newest(folder.checkpoints)
    if saved is None:
        log.warning("--resume: %s has no whole checkpoint; starting at step 0", folder.root)
        return None
    wanted = recipe.train.batch_size * world.size
    if saved.position.global_batch != wanted:
        raise RecipeError(
            f"--resume: the run had {saved.position.global_batch} samples a micro-batch over all processes, this"
            f" start has {wanted}; start as many processes as before, or change train.batch_size to match"
        )
    if saved.position.step > recipe.train.steps:
        raise RecipeError(
            f"--resume: the run is at step {saved.position.step}, train.steps is {recipe.train.steps}; give more"
        )
    return saved


def _opening(
    recipe: Recipe,
    family: Family,
    world: World,
    loaded: Loaded,
    prepared: Prepared,
    attention: AttentionChoice,
) -> Opening:
    return Opening(
        recipe,
        family,
        world,
        loaded.trained,
        loaded.quant,
        quantized_layers=loaded.quantized_layers,
        footprint=loaded.footprint,
        streamed=0 if loaded.stream is None else loaded.stream.host_bytes,
        pictures=len(prepared.samples),
        views=prepared.views,
        sizes=prepared.sizes,
        attention=attention,
        held_out=len(prepared.held_out),
    )


def _sample_settings(recipe: Recipe) -> SampleSettings:
    sample = recipe.sample
    return SampleSettings(sample.steps, sample.guidance_scale, sample.width, sample.height, sample.seed)


def _export(training: Training, loaded: Loaded, finished: Finished) -> None:
    recipe, folder, console, sampler = training.recipe, training.folder, training.console, training.sampler
    denoiser = loaded.denoiser.eval()
    sampler.draw(recipe.train.steps)
    held = recipe.quant.compute_dtype if loaded.quant is None else loaded.quant.quant_type
    name = f"{folder.root.name}: LoRA of rank {recipe.lora.rank}, base in {held}"
    learned = what_was_learned(name, recipe.train.steps, training.prepared, sampler, folder)
    output = recipe.output
    console.print("exporting", highlight=False)
    settings = ExportSettings(
        output.dir.name,
        output.formats,
        output.export_base,
        output.self_check,
        recipe.train.steps,
        loaded.quant,
        started_from=started_from(folder, recipe.lora.init_from),
    )
    exported = export_trained(training.family, denoiser, folder, settings)
    for line in exported_lines(exported):
        console.print(line, highlight=False)
    saved = checkpoint.folders(folder.checkpoints)
    rows = read_metrics(folder.root / METRICS)
    first, last = _ends(rows)
    closing = Closing(
        steps=recipe.train.steps,
        seconds=finished.seconds,
        first_loss=first,
        last_loss=last,
        adapter=exported.adapter,
        base=exported.base,
        checkpoint=saved[-1] if saved else None,
        samples=learned.sheet,
        metrics=folder.root / METRICS,
        validation=learned.validation,
        pictures=learned.pictures,
    )
    write_summary(closing, folder.root / "summary.json")
    write_lines(console, closing_lines(closing))


def _ends(rows: list[StepMetrics]) -> tuple[float | None, float | None]:
    """Mean loss over the first and last tenth of the rows: single losses say little, sigma differs in each."""
    if not rows:
        return None, None
    tenth = max(1, len(rows) // 10)
    return (
        sum(row.loss for row in rows[:tenth]) / tenth,
        sum(row.loss for row in rows[-tenth:]) / tenth,
    )
