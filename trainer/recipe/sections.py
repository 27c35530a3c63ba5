"""The recipe's sections that decide what is trained on what and how, validated once into frozen objects.

Each field is described by the string under it; the JSON Schema, the reference page and the error messages are
made from those and from the constraints.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.hub.reference import is_folder, is_repository
from halfbyte.trainer.objective.losses import LOSSES, MSE, Loss
from halfbyte.trainer.objective.shift import SHIFTS, ResolutionShift, Shift
from halfbyte.trainer.objective.timesteps import TIMESTEPS, LogitNormal, TimestepScheme
from halfbyte.trainer.objective.weighting import WEIGHTINGS, NoWeighting, Weighting
from halfbyte.trainer.recipe.fields import DEFAULT_FOLDER, FilePath, PictureSide, Section, Seed, Text, Texts
from halfbyte.trainer.registry import conflict
from halfbyte.trainer.wording import in_prose, nearest, shown

_TARGET_PRESETS = ("all-linear", "attention")


def _check_patterns(patterns: dict[str, float]) -> dict[str, float]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"got the pattern '{pattern}', expected a regular expression ({error})"
            ) from error
    return patterns


Ranks = Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_check_patterns)]
Alphas = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_check_patterns)]


def _check_targets(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(targets, tuple) or targets in _TARGET_PRESETS:
        if not targets:
            raise ValueError(f"got [], expected at least one module name, or {in_prose(_TARGET_PRESETS)}")
        return targets
    if near := nearest(targets, [preset.replace("-", "_") for preset in _TARGET_PRESETS]):
        raise ValueError(f"got '{targets}'; did you mean '{near.replace('_', '-')}'?")
    try:
        re.compile(targets)
    except re.error as error:
        accepted = "all-linear, attention, a list of module names, or a regular expression"
        raise ValueError(f"got '{targets}', expected {accepted} ({error})") from error
    return targets


Targets = Annotated[
    str | Texts,
    AfterValidator(_check_targets),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(_TARGET_PRESETS)},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "string", "format": "regex"},
            ]
        }
    ),
]


class ModelSection(Section):
    """The model that is trained on."""

    family: Annotated[str, FAMILIES]
    """What kind of model it is."""
    path: str
    """A Hub repository as owner/name, or a folder (./, ../, / or ~ in front), in diffusers' layout. In a
    recipe file ./ and ../ start from the file's folder, on the command line from the current one."""
    revision: Text | None = None
    """A branch, tag or commit of the Hub repository; null: its main branch. A run keeps to the commit that it found."""
    transformer: FilePath | None = None
    """What to take the transformer's weights from instead: a Hub repository (owner/name or owner/name@revision) or a
    folder in diffusers' layout, as `halfbyte quantize` writes one, of either its transformer/ where it has one; or one
    safetensors file (FLUX, as BFL or ComfyUI name layers; bf16 or fp8), which is quantized at each start. The rest is
    path's, and so is the architecture."""
    text_encoder: FilePath | None = None
    """What to take T5, the large text encoder, from instead: a Hub repository (owner/name or owner/name@revision) or a
    folder, of either its text_encoder_2/ (FLUX) or text_encoder_3/ (SD3) where it has one. Its tokenizer is path's."""
    max_sequence_length: int | None = Field(default=None, ge=1, le=512)
    """T5 tokens that a caption is padded or cut to; null: the family's own (FLUX.1-schnell and SD3 256, other
    FLUX 512)."""
    text_encoder_quant: Literal["auto", "none", "int8", "nf4"] = "auto"
    """How T5, the large text encoder, is held while captions are encoded: none in bf16 (T5-XXL 9.5 GB), int8
    (5.2 GB) or nf4 (4.4 GB, at seven times int8's error); auto: int8 above a billion parameters, else none. One that is
    stored quantized is taken as it is."""
    stream_text_encoder: bool = False
    """Keep T5's packed blocks in page-locked host memory while captions are encoded (T5-XXL in int8: 4.3 GB), each
    copied to the device ahead of its use: for SD3 on a card of 6 GB, FLUX on one of 4. Embeddings are the same."""
    cache_base: bool = True
    """Keep the quantized base beside data.cache_dir's latents, so that the next start need not quantize again."""

    @field_validator("path")
    @classmethod
    def _is_folder_or_repository(cls, path: str) -> str:
        if not is_folder(path) and not is_repository(path):
            accepted = "a Hub repository as owner/name, or a folder with ./, ../, / or ~ in front"
            name, behind, revision = path.partition("@")
            hint = f"; write model.revision: {revision}" if behind and is_repository(name) else ""
            raise ValueError(f"got {shown(path)}, expected {accepted}{hint}")
        return path

    @model_validator(mode="after")
    def _folders_have_no_revisions(self) -> Self:
        if self.revision is not None and is_folder(self.path):
            raise conflict("revision", f"got '{self.revision}', but {self.path} is a folder; expected null")
        return self

    @model_validator(mode="after")
    def _packed_blocks_stream(self) -> Self:
        if self.stream_text_encoder and self.text_encoder_quant == "none":
            raise conflict(
                "stream_text_encoder",
                "got true, expected false where model.text_encoder_quant is none: only packed blocks are streamed",
            )
        return self


class QuantSection(Section):
    """How the frozen base is stored and computed with."""

    type: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the base's linear layers are held: in 4 bits (nf4, fp4), in 8 (int8, which is LLM.int8()), or in
    compute_dtype (none)."""
    double_quant: bool = True
    """Quantize the block scales too: 0.4 bit a parameter less. Without meaning where type is int8 or none."""
    scale_search: Literal["none", "mse"] = "none"
    """mse: give each block of 4-bit weights the scale with the least squared error instead of its largest
    magnitude: 8 % less error in the same files, at several times the time to quantize."""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """Where type is int8: input columns that reach this magnitude are multiplied in compute_dtype; 0: none are."""
    skip: Texts = ()
    """Names of modules to keep in compute_dtype, matched as diffusers matches them: the last part of a path,
    or any part followed by a dot."""
    exact: Texts = ()
    """Whole paths of layers outside the blocks that are multiplied by their weights in full precision here, though
    files hold them packed: for layers that skip cannot name alone, as FLUX's proj_out. Their weights must be at hand
    in full precision, in the model's folder or beside the packed ones, where halfbyte quantize puts them."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The precision of activations and of every weight that is not quantized."""

    @model_validator(mode="after")
    def _only_blocks_have_scales_to_search(self) -> Self:
        if self.scale_search != "none" and self.type not in ("nf4", "fp4"):
            raise conflict(
                "scale_search", f"got {self.scale_search}, expected none where quant.type is {self.type}"
            )
        return self


class LoraSection(Section):
    """What learns."""

    rank: int = Field(default=16, ge=1)
    """The inner size of the adapters; their parameters grow with it."""
    alpha: float = Field(default=16, gt=0)
    """The update is scaled by alpha / rank."""
    rank_pattern: Ranks = Field(default={})
    """Other ranks for some layers, as {proj_mlp: 32}: a regular expression for the end of a module name, and its
    rank. The first that fits is taken; one that fits no layer with an adapter is an error."""
    alpha_pattern: Alphas = Field(default={})
    """Other alphas for some layers, in the same way; a layer whose rank alone is given keeps lora.alpha."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones (rsLoRA)."""
    dora: bool = False
    """Also learn the length of each row of the adapted weights (DoRA): nearer to full fine-tuning at low ranks, at
    more time a step. Computed by this trainer's own layers, so train.fused_adapters must be true."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is zeroed in training."""
    targets: Targets = "all-linear"
    """The layers with an adapter: all-linear, attention, a list of module names, or a regular expression over
    whole module names."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts: gaussian as in diffusers' scripts, kaiming as PEFT's default; B starts at zero."""
    init_from: FilePath | None = None
    """An adapter to start from instead: a run, a file or folder of diffusers, PEFT, ComfyUI or kohya, or a Hub
    repository (owner/name or owner/name@revision) with the file of diffusers or PEFT. Where the run's rank is larger
    the update is the same; layers without one start as init says. null: none."""


class DataSection(Section):
    """The pictures and their captions."""

    path: FilePath
    """A folder of pictures, with captions in metadata.jsonl or metadata.csv, or in .txt files beside them; or a folder
    of .parquet files, or one of them. A relative path starts from the recipe file's folder, on the command line from
    the current one."""
    resolution: PictureSide = 1024
    """Pixels: the side of a square, or of the square with a bucket's area."""
    aspect_buckets: bool = True
    """Group pictures by their proportions; false: everything is cropped to a square."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture is kept where its proportions do not fit."""
    random_crops: int = Field(default=1, ge=1)
    """How many crops of each picture are cached when crop is random."""
    flip: bool = False
    """Also train on mirrored pictures."""
    # Only with a length does pydantic look whether it is text: an argument of the shell need not be.
    caption_prefix: str = Field(default="", min_length=0)
    """Put before every caption, e.g. a trigger word."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples trained with an empty caption."""
    cache_dir: FilePath | None = None
    """Where latents and text embeddings are kept between runs; null: ~/.cache/halfbyte."""

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or DEFAULT_FOLDER.expanduser()

    @model_validator(mode="after")
    def _crops_differ_only_at_random(self) -> Self:
        if self.random_crops > 1 and self.crop == "center":
            raise conflict("random_crops", f"got {self.random_crops}, expected 1 where data.crop is center")
        return self


class ObjectiveSection(Section):
    """What the adapters learn to do: the noise levels, their weight, the distance."""

    timesteps: Annotated[TimestepScheme, TIMESTEPS] = LogitNormal(name="logit_normal")
    """How often each noise level is drawn."""
    shift: Annotated[Shift, SHIFTS] = ResolutionShift(name="resolution")
    """How the drawn levels move with the picture's size. FLUX.1-dev: resolution; FLUX.1-schnell: none; SD3:
    static, 3.0."""
    weighting: Annotated[Weighting, WEIGHTINGS] = NoWeighting(name="none")
    """How much each noise level counts in the loss."""
    loss: Annotated[Loss, LOSSES] = MSE(name="mse")
    """The distance of the predicted velocity from noise - x0."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """What the model is told in training; only models with guidance embeddings (FLUX.1-dev) use it."""


class TrainSection(Section):
    """The run."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures a process and micro-batch."""
    grad_accumulation: int = Field(default=1, ge=1)
    """Micro-batches an optimizer step."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm; null: no clipping."""
    gradient_checkpointing: Literal["none", "selective", "full", "offload"] = "full"
    """What the blocks keep for the backward: their inputs alone (full), the same in page-locked host memory
    (offload), also what attention gave, so that it runs once (selective), or everything that costs a product
    (none). What is not kept is computed again. Layer by layer (train.fused_blocks: false) selective and offload are
    full."""
    attention: Literal["auto", "cudnn", "flash", "flash4", "efficient", "deterministic"] = "auto"
    """The kernel that attention runs on CUDA. auto: the fastest of those whose output and gradients prove right at
    the run's shapes, each tried in a process of its own, once for a device. flash4: FlashAttention-4, the fastest on
    Hopper, where it is installed (pip install 'flash-attn-4[cu13]>=4.0.0b36'). deterministic: flash, with a slower
    backward that repeats to the bit, so that a resumed run does too; the CPU always does."""
    fused_adapters: bool = True
    """Compute each layer and its adapter as one function, which keeps less for the backward; false: PEFT's own
    layers, which give the same up to rounding."""
    fused_blocks: bool = True
    """Run each block as one function with its own backward, where it can be (FLUX; adapters without dropout or
    DoRA, bases of 4 bits or none): faster and smaller, the same up to rounding. Without meaning where
    fused_adapters is false."""
    stream_blocks: bool = False
    """Keep the packed weights of the transformer's blocks in page-locked host memory (FLUX.1 5.7 GB, a process), and
    copy each block to the device ahead of its use, twice a micro-batch: what cards of 6 GB and less need. The same to
    the bit; how much slower depends on the bus."""
    cuda_graphs: bool = False
    """Record a step's kernels once for each size of picture, and launch them as a whole from then on: where the
    processor is slower at launching than the device at computing, as at 512 px. The same kernels; what is
    recorded ahead of training is compared with the step itself first. A step's working memory stays taken, while
    pictures are drawn too. For blocks that run as one function, on CUDA alone."""
    seed: Seed = 0
    """Everything random follows from it."""

    @model_validator(mode="after")
    def _whole_blocks_are_recorded(self) -> Self:
        excluded = {
            "stream_blocks": (self.stream_blocks, "true"),
            "gradient_checkpointing": (self.gradient_checkpointing == "offload", "offload"),
            "fused_blocks": (not self.fused_blocks, "false"),
            "fused_adapters": (not self.fused_adapters, "false"),
        }
        for name, (holds, value) in excluded.items():
            if self.cuda_graphs and holds:
                raise conflict("cuda_graphs", f"got true, expected false where train.{name} is {value}")
        return self
