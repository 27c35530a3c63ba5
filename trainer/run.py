"""The story of one training run, from the recipe to the exported files."""

import logging
import math
import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from halfbyte.trainer.adapters.lora import load_adapter_state
from halfbyte.trainer.data.prepare import Prepared, prepare
from halfbyte.trainer.data.record import write_record
from halfbyte.trainer.data.size_limits import refuse_large
from halfbyte.trainer.data.sources.left_out import DAMAGED
from halfbyte.trainer.denoiser.attention import AttentionChoice, AttentionShape, choose_attention
from halfbyte.trainer.denoiser.load import Loaded, check_exact, load_denoiser, start_layers
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.errors import HubError, RecipeError
from halfbyte.trainer.export.export import ExportSettings, export_trained, exported_lines
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.plan.advice import oom_advice
from halfbyte.trainer.plan.dry_run import DryRun
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.publish.push import PushRequest, check_push, prepare_push, push
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.run_folder.batching import check_order
from halfbyte.trainer.run_folder.folder import RunFolder, begin, claim
from halfbyte.trainer.run_folder.lock import lock_run
from halfbyte.trainer.run_folder.pinned_base import (
    INIT_FROM,
    Commits,
    at_commit,
    find_commits,
    open_base,
    pin_base,
    started_from,
)
from halfbyte.trainer.run_folder.pinned_data import data_at_commits, find_data_commits
from halfbyte.trainer.runtime.progress import write_lines
from halfbyte.trainer.runtime.signals import SIGNALS, describe
from halfbyte.trainer.runtime.world import World, barrier, broadcast_from_leader, join
from halfbyte.trainer.sample.sampler import PictureSampler, SampleSettings
from halfbyte.trainer.training.loop import Finished, Training, train
from halfbyte.trainer.training.metrics import METRICS, StepMetrics, read_metrics
from halfbyte.trainer.training.opening import Opening, opening_lines
from halfbyte.trainer.training.outcome import Closing, closing_lines, what_was_learned, write_summary

log = logging.getLogger(__name__)

_ENCODING = ("encode texts", "encode pictures")  # phases of the plan
_AFTER_LAST_STEP = "after the last step; its checkpoint is complete, and `halfbyte export` exports it"


def run(recipe: Recipe, world: World, *, console: Console, resume: bool) -> bool:
    """Trains and exports; returns False if a signal stopped the run, which can be resumed.

    Raises:
        HalfbyteError: anything that a user can fix, before anything in `output.dir` changes.
        Stopped: a signal came before the first step or after the last one.
    """
    with SIGNALS.installed(), ExitStack() as held:
        return _run(recipe, world, console, resume, held)


def _run(recipe: Recipe, world: World, console: Console, resume: bool, held: ExitStack) -> bool:
    """Does the work of `run`; `held` keeps the lock on the run's folder until the end."""
    started = time.perf_counter()
    folder = RunFolder(recipe.output.dir)

    # Check the settings that need no model, and take the run's folder.
    _check_precision(recipe, world)
    join(world)
    repository = recipe.output.push_to_hub

    def take_folder() -> None:
        held.enter_context(lock_run(folder.root))
        claim(folder, recipe, resume=resume, processes=world.size)
        if repository is not None:
            check_push(repository)

    broadcast_from_leader(world, take_folder)

    # Open the base model, without loading its weights.
    base = _open_base(recipe, world, folder)
    family = base.family
    refuse_large(recipe, family)
    when_full = partial(oom_advice, recipe, family)
    # A dry run and the adapter's file, so that wrong layer names, exact layers that cannot be read and an
    # adapter that does not fit fail before the encoding.
    dry_run = DryRun(recipe, family)
    check_exact(family, dry_run.denoiser, recipe.quant.exact)
    start = start_layers(base.init_from, family, dry_run.denoiser)
    del dry_run

    # Encode captions and images into the cache.
    with when_full("while encoding captions and images; finished encodings stay in the cache", *_ENCODING):
        started_on = folder.data if resume and folder.can_go_on else None
        at_start = recipe.model_copy(update={"data": data_at_commits(recipe.data, base.commits)})
        prepared = prepare(at_start, family, world, console, started_on=started_on)
    saved = _saved_state(folder, recipe, world, prepared) if resume else None

    # Load and quantize the transformer, and add the adapters.
    attention = _choose_attention(recipe, family, world, prepared)
    with when_full("while loading the transformer", "load and quantize"):
        loaded = load_denoiser(recipe, family, world, console, attention=attention.backend, start=start)
        del start  # frees the adapter's tensors
    barrier(world)  # all processes have checked the run folder; only now may the leader write to it
    write_lines(console, opening_lines(_opening(recipe, family, world, loaded, prepared, attention)))

    # Start the run folder, and generate the sample images of step 0.
    sampler = _sampler(recipe, family, world, loaded, prepared, folder)
    if world.is_leader:
        _write_start(recipe, base, folder)
        if started_on is None or not folder.data.is_file():
            write_record(folder.data, prepared.record)
        if saved is None:
            with when_full("while generating the first sample images", *_sampling_phases(recipe)):
                sampler.draw(0)
    barrier(world)

    # Continue from the checkpoint, if there is one.
    if saved is not None:
        load_adapter_state(loaded.denoiser, saved.adapter)
        console.print(f"resuming at step {saved.position.step} from {saved.folder}", highlight=False)
    ready = time.perf_counter() - started
    console.print(f"ready after {ready:.1f} s", highlight=False)

    # Train.
    training = Training(
        recipe, family, world, prepared, loaded.denoiser, folder, saved, sampler, console, when_full
    )
    finished = train(training)
    if not finished.done:
        assert SIGNALS.received is not None
        console.print(
            f"{describe(SIGNALS.received)} at step {finished.step} of {recipe.train.steps}; continue with --resume",
            highlight=False,
        )
        return False
    SIGNALS.raise_received()  # it came during the last step

    # Export, then upload.
    if world.is_leader:
        with when_full(_AFTER_LAST_STEP, *_sampling_phases(recipe)):
            _export(training, loaded, finished)
    barrier(world)
    # After the last barrier, so that no process waits for the upload.
    if world.is_leader and repository is not None:
        _push(folder.root, console)
    return True


def _check_precision(recipe: Recipe, world: World) -> None:
    if recipe.quant.compute_dtype == "float16" and world.device.type == "cpu":
        raise RecipeError(
            "quant.compute_dtype: got float16, which needs a CUDA device, but this run is on the CPU; set bfloat16 or"
            " float32"
        )


@dataclass(frozen=True)
class _Base:
    """The model that a run trains on, without its weights."""

    family: Family
    commits: Commits
    digests: FileDigests
    init_from: Path | None  # the adapter that the run starts from, at its commit


def _open_base(recipe: Recipe, world: World, folder: RunFolder) -> _Base:
    init_from = recipe.lora.init_from
    # Only the leader asks the Hub, so that all processes read the same commits.
    commits = broadcast_from_leader(
        world,
        lambda: {
            **find_commits(folder, recipe.model, init_from),
            **find_data_commits(folder, recipe.data),
        },
    )
    if init_from is not None:
        init_from = at_commit(init_from, commits.get(INIT_FROM))
    digests = FileDigests(recipe.data.cache_folder / "digests")
    family = open_base(folder, recipe.model, digests, commits=commits)
    return _Base(family, commits, digests, init_from)


def _saved_state(
    folder: RunFolder, recipe: Recipe, world: World, prepared: Prepared
) -> checkpoint.Checkpoint | None:
    """Reads the newest checkpoint; None with a warning if there is none.

    Raises:
        RecipeError: the run would take the samples in another order, or the checkpoint is after `train.steps`.
    """
    saved = checkpoint.newest(folder.checkpoints)
    if saved is None:
        log.warning("--resume: %s has no complete checkpoint; starting at step 0", folder.root)
        return None
    check_order(saved.position, recipe.train, world.size, len(prepared.plan.kinds))
    if saved.position.step > recipe.train.steps:
        raise RecipeError(
            f"--resume: the run is at step {saved.position.step}, but train.steps is {recipe.train.steps}; set"
            " train.steps higher"
        )
    return saved


def _choose_attention(recipe: Recipe, family: Family, world: World, prepared: Prepared) -> AttentionChoice:
    """Chooses the attention backend for the run's largest image size.

    One process per machine probes the backends; the other processes find its result in the cache.
    """
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
        data=prepared.summaries,
        sizes=prepared.sizes,
        mean_batch=prepared.plan.mean_batch,
        attention=attention,
        held_out=len(prepared.held_out),
        texts=prepared.texts,
        text_bytes=prepared.text_bytes,
    )


def _sampler(
    recipe: Recipe, family: Family, world: World, loaded: Loaded, prepared: Prepared, folder: RunFolder
) -> PictureSampler:
    sample = recipe.sample
    return PictureSampler(
        family,
        loaded.denoiser,
        prepared.prompts,
        prepared.empty,
        SampleSettings(sample.steps, sample.guidance_scale, sample.width, sample.height, sample.seed),
        folder=folder.samples,
        device=world.device,
        dtype=DTYPES[recipe.quant.compute_dtype],
    )


def _write_start(recipe: Recipe, base: _Base, folder: RunFolder) -> None:
    begin(folder, recipe)
    # Pinned only now: loading has read the base's files, so their digests are known and cost nothing.
    pin_base(folder, base.family, base.digests, base.commits)


def _sampling_phases(recipe: Recipe) -> tuple[str, ...]:
    """Returns the plan's phases for the work before the first and after the last step."""
    return ("sample", "export") if recipe.sample.prompts else ("export",)


def _export(training: Training, loaded: Loaded, finished: Finished) -> None:
    """Generates the last sample images, compares them with the first ones, exports and writes the summary."""
    recipe, folder, console, sampler = training.recipe, training.folder, training.console, training.sampler
    denoiser = loaded.denoiser.eval()
    sampler.draw(recipe.train.steps)
    base_format = recipe.quant.compute_dtype if loaded.quant is None else loaded.quant.quant_type
    name = f"{folder.root.name}: LoRA of rank {recipe.lora.rank}, base in {base_format}"
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
    first, last = _first_and_last_loss(rows)
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
        skipped=[name for read in training.prepared.data.sets for name in read.left_out.of(DAMAGED)],
    )
    write_summary(closing, folder.root / "summary.json")
    write_lines(console, closing_lines(closing))


def _first_and_last_loss(rows: list[StepMetrics]) -> tuple[float | None, float | None]:
    """Returns the mean loss of the first and of the last tenth of the rows.

    A single loss says little, because sigma differs from step to step.
    """
    rows = [row for row in rows if math.isfinite(row.loss)]  # not of steps that were left out
    if not rows:
        return None, None
    tenth = max(1, len(rows) // 10)
    return (
        sum(row.loss for row in rows[:tenth]) / tenth,
        sum(row.loss for row in rows[-tenth:]) / tenth,
    )


def _push(run: Path, console: Console) -> None:
    try:
        push(prepare_push(PushRequest(run)), console)
    except HubError as error:
        again = f"halfbyte push {shlex.quote(str(run))}"
        raise HubError(
            f"{error}\nThe run is finished and complete in {run}; only the upload failed. To repeat it: {again}"
        ) from error
