"""Runs `halfbyte sample`: resolves the request, encodes prompts, generates images and writes them."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfbyte.trainer.cuda_graphs.recorder import CudaRecorder
from halfbyte.trainer.data.cache.encodings import encode_missing
from halfbyte.trainer.data.size_limits import refuse_large_drawings
from halfbyte.trainer.data.text_precision import choose_t5_quant
from halfbyte.trainer.denoiser.attention import AttentionShape, choose_attention
from halfbyte.trainer.errors import LaunchError, RecipeError
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.stock_parts import load_t5_tokenizer
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.runtime.device_memory import free_bytes, free_unused, when_full
from halfbyte.trainer.runtime.placement import Placement
from halfbyte.trainer.runtime.progress import LazyProgress, Progress, write_lines
from halfbyte.trainer.runtime.version import halfbyte_version
from halfbyte.trainer.runtime.world import World, join
from halfbyte.trainer.sample.draw import Drawing, describe_base
from halfbyte.trainer.sample.picture_files import DrawnWith, Job, PictureFolder
from halfbyte.trainer.sample.request import SampleRequest
from halfbyte.trainer.sample.sampler import PictureSettings
from halfbyte.trainer.sample.source import Subject, find_subject

log = logging.getLogger(__name__)

_WHEN_FULL = (
    "the device ran out of memory; to use less: --offload model or sequential, --quant nf4, --text-encoder-quant nf4,"
    " or a smaller --width and --height"
)


def sample(request: SampleRequest, world: World, console: Console) -> bool:
    """Generates the requested images. Returns True if all were generated, False if Ctrl-C stopped it earlier.

    Raises:
        HalfbyteError: for problems that the user can fix; almost all are found before any model is loaded.
    """
    if world.size > 1:
        raise LaunchError(
            f"halfbyte sample runs in one process, but {world.size} were started; start it without a launcher"
        )
    join(world)
    subject = find_subject(request, world.device)
    settings, jobs = _settings(request, subject), _jobs(request, subject)
    refuse_large_drawings(subject.family, {"--width": settings.width, "--height": settings.height})
    placement = Placement(world.device, request.offload, request.device_map)
    if placement.moves_layers and subject.adapter is not None and subject.adapter.is_dora:
        raise RecipeError(
            f"{subject.name} is a DoRA adapter, which reads its layers' weights directly, so they cannot be moved"
            " one by one; use --offload none or model, and no --device-map"
        )
    folder = PictureFolder(request.output, Path.cwd() if subject.run is None else subject.run)
    _warn_about_long_prompts(subject.family, jobs)
    with when_full(lambda: _WHEN_FULL):
        return _draw(request, subject, settings, jobs, placement, folder, console)


def _settings(request: SampleRequest, subject: Subject) -> PictureSettings:
    default = subject.settings
    return PictureSettings(
        request.steps or default.steps,
        default.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        request.width or default.width,
        request.height or default.height,
    )


def _jobs(request: SampleRequest, subject: Subject) -> list[Job]:
    """Returns a job for every prompt at every strength with every seed. Strengths vary slowest."""
    prompts = request.prompts or subject.prompts
    if not prompts:
        raise RecipeError("--prompt: there is no prompt; give --prompt once or more, or --prompts-file")
    strengths: Sequence[float | None] = (None,) if subject.adapter is None else request.strengths or (1.0,)
    jobs = []
    for strength in strengths:
        for place, prompt in enumerate(prompts):
            # As in the samples of training, each prompt of a run has its own seed.
            seeds = request.seeds or (subject.settings.seed + (place if subject.run is not None else 0),)
            jobs += [Job(place, prompt, strength, seed, number) for number, seed in enumerate(seeds)]
    return jobs


def _warn_about_long_prompts(family: Family, jobs: Sequence[Job]) -> None:
    tokenizer = load_t5_tokenizer(family)
    limit = family.max_sequence_length
    for prompt in dict.fromkeys(job.prompt for job in jobs):
        tokens = tokenizer(prompt).input_ids
        if len(tokens) > limit:
            # The last of the model's tokens is the end token, so one token more is lost.
            lost = tokenizer.decode(tokens[limit - 1 :], skip_special_tokens=True)
            log.warning(
                "a prompt has %d T5 tokens, but the model uses only %d; cut off: %r", len(tokens), limit, lost
            )


def _draw(
    request: SampleRequest,
    subject: Subject,
    settings: PictureSettings,
    jobs: Sequence[Job],
    placement: Placement,
    folder: PictureFolder,
    console: Console,
) -> bool:
    family = subject.family
    height, width = settings.height // family.vae_scale, settings.width // family.vae_scale
    shape = AttentionShape(
        family.image_tokens(height, width) + family.text_tokens, *family.attention_heads, subject.dtype
    )
    attention = choose_attention("auto", shape, placement.device, subject.cache_folder)
    one_by_one = _why_one_by_one(request, subject, placement)
    write_lines(
        console,
        _opening(
            request,
            subject,
            settings,
            jobs,
            attention=f"{attention.backend}: {attention.reason}",
            compiles=_compiles(request, subject, one_by_one),
            launches=one_by_one or "as CUDA graphs, recorded at the second step",
        ),
    )
    texts = _encode(subject, jobs, placement, console)
    drawing = Drawing(
        subject,
        settings,
        placement,
        attention.backend,
        _compiles(request, subject, one_by_one),
        CudaRecorder if one_by_one is None else None,
        texts,
        console,
    )
    drawn_with: dict[str, Any] | None = None
    steps = _Steps(console, len(jobs) * settings.steps)
    began, count = time.perf_counter(), 0
    try:
        for job, picture in drawing.pictures(jobs, steps.advance):
            if drawn_with is None:
                # By now the base's files have been read, so their digests are cached.
                drawn_with = _drawn_with(request, subject, settings, attention.backend).record()
            folder.add(job, picture, drawn_with)
            count += 1
    finally:
        steps.close()
    if not count:
        raise KeyboardInterrupt
    grid = folder.finish([_heading(subject)])
    seconds = time.perf_counter() - began
    console.print(
        f"{count} of {len(jobs)} images in {seconds:.1f} s, including loading: {folder.root}",
        highlight=False,
    )
    console.print(f"grid: {grid}", highlight=False)
    return count == len(jobs)


class _Steps:
    """The progress bar over the sampling steps of all images."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._progress: Progress | None = None

    def advance(self) -> None:
        """Counts one more step."""
        self._done += 1
        if self._progress is None:
            # Start the clock after the first step, which includes the compilation of kernels.
            self._progress = Progress(self._console, "generating", total=self._total, done=self._done)
        self._progress.advance(self._done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


def _encode(
    subject: Subject, jobs: Sequence[Job], placement: Placement, console: Console
) -> Mapping[str, TextEmbedding]:
    """Returns the prompts' embeddings, from the cache that training uses. Frees the text encoders before it returns."""
    encoding = LazyProgress(console, "encoding", "entry")
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    encoders = load_encoders(
        subject.family,
        device=placement.device,
        dtype=torch.bfloat16,
        memo=subject.cache_folder / "digests",
        t5_quant=choose_t5_quant(
            subject.text_encoder_quant,
            subject.family,
            subject.cache_folder,
            prompts,
            dtype=torch.bfloat16,
            free=free_bytes(placement.device) if placement.stays else None,
        ),
        placement=placement,
    )
    texts = encode_missing(subject.cache_folder, encoders, [], prompts, progress=encoding)[1]
    encoding.close()
    del encoders
    free_unused(placement.device)
    return {prompt: texts.read(prompt) for prompt in (*prompts, "")}


def _why_one_by_one(request: SampleRequest, subject: Subject, placement: Placement) -> str | None:
    """Says why the transformer's forward is not recorded as a CUDA graph; None if it is recorded."""
    if not request.compiled:
        return "one by one (no --compile)"
    if placement.device.type != "cuda":
        return f"one by one: CUDA graphs do not exist on {placement.device.type}"
    if not placement.stays:
        return f"one by one: --offload {request.offload} moves the transformer"
    if subject.quant is not None and subject.quant.quant_type == "int8":
        return "one by one: each int8 layer waits for a count of outliers"
    return None


def _compiles(request: SampleRequest, subject: Subject, one_by_one: str | None) -> bool:
    """Returns True if torch compiles the blocks.

    Blocks that are recorded as CUDA graphs and run as one function are not compiled: compiled code copies each part's
    result to where the next part reads it, whereas the block's own functions write it there directly. Only DoRA
    prevents blocks from running as one function.
    """
    whole = subject.adapter is None or not subject.adapter.is_dora
    return request.compiled and not (one_by_one is None and whole)


def _opening(
    request: SampleRequest,
    subject: Subject,
    settings: PictureSettings,
    jobs: Sequence[Job],
    *,
    attention: str,
    compiles: bool,
    launches: str,
) -> list[tuple[str, str]]:
    adapter = subject.adapter
    lines = [("model", subject.family.describe_source()), ("base", describe_base(subject))]
    if adapter is not None:
        ranks = sorted({layer.rank for layer in adapter.layers.values()})
        spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kind = "DoRA" if adapter.is_dora else "LoRA"
        lines.append(("adapter", f"{adapter.name}: {kind} of rank {spread} on {len(adapter.layers)} layers"))
    blocks = "each as one function where possible" + (", compiled" if compiles else "")
    lines += [
        ("attention", attention),
        ("blocks", blocks),
        ("launches", launches),
        ("guidance", subject.family.describe_guidance(settings.guidance_scale)),
        ("images", f"{len(jobs)} of {settings.width}x{settings.height}, {settings.steps} steps each"),
    ]
    return lines


def _drawn_with(
    request: SampleRequest, subject: Subject, settings: PictureSettings, attention: str
) -> DrawnWith:
    family, adapter = subject.family, subject.adapter
    digests = FileDigests(subject.cache_folder / "digests")
    weights = family.denoiser_fingerprint(digests)
    quant = {"quant_type": "none"} if subject.quant is None else subject.quant.as_json()
    return DrawnWith(
        # Only the folder's name, not its path: images are passed on, and paths may contain private names.
        base={
            "name": family.source.name if family.source.revision else family.source.folder.resolve().name,
            "revision": family.source.revision,
            "weights": weights,
            **_replaced_parts(family, digests),
        },
        adapter=None if adapter is None else {"name": adapter.name, "sha256": adapter.sha256},
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        width=settings.width,
        height=settings.height,
        max_sequence_length=family.max_sequence_length,
        quant=quant,
        text_encoder_quant=subject.text_encoder_quant,
        dtype=str(subject.dtype).removeprefix("torch."),
        attention=attention,
        compiled=request.compiled,
        offload=request.offload,
        device_map=request.device_map,
        halfbyte=halfbyte_version(),
    )


def _replaced_parts(family: Family, digests: FileDigests) -> dict[str, str]:
    """Returns the sources of a transformer or T5 that does not come from the base's own folder.

    A part from the Hub is named with its commit, another T5 by its digest.
    """
    parts = {}
    for name, part in (("transformer", family.transformer), ("text_encoder", family.t5)):
        if part.is_own and part.revision is not None:
            parts[name] = f"{part.name}@{part.revision}"
        elif part.is_own and part is family.t5:
            parts[name] = family.t5_fingerprint(digests)
    return parts


def _heading(subject: Subject) -> str:
    adapter = "no adapter" if subject.adapter is None else subject.adapter.name
    return f"{subject.name}: {adapter}; base {describe_base(subject)}"
