"""Recipe sections for the training itself: model, quant, lora, data, objective and train.

Each section is validated once into a frozen object. The string under a field describes it: the JSON Schema, the
reference page and the error messages are made from these strings and from the field's constraints.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from halfbyte.trainer.adapters.patterns import fault_of
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.hub.reference import is_folder, is_repository
from halfbyte.trainer.objective.losses import LOSSES, MSE, Loss
from halfbyte.trainer.objective.shift import SHIFTS, ResolutionShift, Shift
from halfbyte.trainer.objective.timesteps import TIMESTEPS, LogitNormal, TimestepScheme
from halfbyte.trainer.objective.weighting import WEIGHTINGS, NoWeighting, Weighting
from halfbyte.trainer.optim.nonfinite import NONFINITE, OnNonFinite, Stop
from halfbyte.trainer.recipe.fields import (
    FilePath,
    PictureSide,
    Section,
    Seed,
    Steps,
    Text,
    Texts,
)
from halfbyte.trainer.registry import conflict
from halfbyte.trainer.wording import in_prose, nearest, shown

MOST_RANK = 2**14  # above the smaller side of every layer
_TARGET_PRESETS = ("all-linear", "attention")


def _check_patterns(patterns: dict[str, float]) -> dict[str, float]:
    for pattern in patterns:
        fault = fault_of(pattern)
        if fault is not None:
            raise ValueError(f"got the pattern '{pattern}', expected a regular expression ({fault})")
    return patterns


Ranks = Annotated[dict[str, Annotated[int, Field(ge=1, le=MOST_RANK)]], AfterValidator(_check_patterns)]
Alphas = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_check_patterns)]


def _check_targets(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(targets, tuple) or targets in _TARGET_PRESETS:
        if not targets:
            raise ValueError(f"got [], expected at least one module name, or {in_prose(_TARGET_PRESETS)}")
        return targets
    if near := nearest(targets, [preset.replace("-", "_") for preset in _TARGET_PRESETS]):
        raise ValueError(f"got '{targets}'; did you mean '{near.replace('_', '-')}'?")
    fault = fault_of(targets)
    if fault is not None:
        accepted = "all-linear, attention, a list of module names, or a regular expression"
        raise ValueError(f"got '{targets}', expected {accepted} ({fault})")
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


Images = Annotated[int, Field(ge=1, le=10_000)]
# Keys of a recipe file are texts, so they are not read strictly.
ImagesByResolution = Annotated[
    dict[Annotated[PictureSide, Field(strict=False)], Images],
    Field(min_length=1, json_schema_extra={"examples": [{"1024": 1}]}),
]

MOST_TEXT_TOKENS = 512
"""The most tokens for T5 that the stock pipelines accept."""


class ModelSection(Section):
    """The pretrained model that the adapters are trained on."""

    family: Annotated[str, FAMILIES]
    """The model family: flux for FLUX.1, sd3 for Stable Diffusion 3 and 3.5. It must match the model that `path`
    names."""
    path: str
    """The pretrained pipeline in diffusers' layout: a Hub repository as owner/name, or a folder, written with ./, ../,
    / or ~ in front. In a recipe file ./ and ../ are relative to that file's folder; on the command line they are
    relative to the current folder."""
    revision: Text | None = None
    """The branch, tag or commit of the Hub repository; null uses its main branch. A run stays on the commit that it
    resolved when it started, so resuming never switches to newer weights. Must be null when path is a folder."""
    transformer: FilePath | None = None
    """Another source for the transformer's weights; null takes them from path. Accepts a Hub repository (owner/name
    or owner/name@revision) or a folder in diffusers' layout, such as `halfbyte quantize` writes; a transformer/
    folder inside it is used if there is one. For FLUX it also accepts one safetensors file in bf16 or fp8, with BFL's
    or ComfyUI's layer names; such a file is quantized at every start. The architecture and all other parts of the
    pipeline still come from path."""
    text_encoder: FilePath | None = None
    """Another source for T5, the large text encoder; null takes it from path. Accepts a Hub repository (owner/name or
    owner/name@revision) or a folder; a text_encoder_2/ (FLUX) or text_encoder_3/ (SD3) folder inside it is used if
    there is one. Use it to load a T5 that is already quantized. The tokenizer still comes from path."""
    max_sequence_length: int | None = Field(default=None, ge=1, le=MOST_TEXT_TOKENS)
    """The number of T5 tokens that each caption is padded or cut to; null uses the model's own length: 256 for
    FLUX.1-schnell and SD3, 512 for other FLUX models. A smaller value makes steps faster if all captions are short."""
    text_encoder_quant: Literal["auto", "none", "int8", "nf4"] = "auto"
    """The precision of T5, the large text encoder, while captions are encoded: none (bf16, 9.5 GB for T5-XXL), int8
    (5.2 GB) or nf4 (4.4 GB, with seven times int8's error). auto uses none where that fits the free device memory (14
    GB for T5-XXL), and int8 elsewhere; captions that are cached in one of them stay in it. A T5 that is stored
    quantized keeps the format it is stored in."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """The precision of the VAE while images are encoded. bfloat16 is faster on large data sets, and changes the latents
    by about 1 %."""
    stream_text_encoder: bool = False
    """Keep T5's quantized blocks in page-locked host memory while captions are encoded, and copy each block to the
    device just before it runs. It takes 4.3 GB of host memory for T5-XXL in int8. Turn it on for SD3 on a 6 GB card
    or FLUX on a 4 GB card. The embeddings do not change. Requires a quantized T5 (text_encoder_quant other than
    none)."""
    cache_base: bool = True
    """Store the quantized base next to the latents in data.cache_dir, so that later starts load it instead of
    quantizing again. Set it to false to save the disk space."""

    @field_validator("path")
    @classmethod
    def _is_folder_or_repository(cls, path: str) -> str:
        if not is_folder(path) and not is_repository(path):
            accepted = "a Hub repository as owner/name, or a folder that starts with ./, ../, / or ~"
            name, separator, revision = path.partition("@")
            hint = f"; write model.revision: {revision}" if separator and is_repository(name) else ""
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
                "got true, expected false because model.text_encoder_quant is none: only quantized blocks can be"
                " streamed",
            )
        return self


class QuantSection(Section):
    """The quantization of the frozen base model, and the precision in which it computes."""

    type: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """The format of the base's linear layers: nf4 or fp4 (4 bits), int8 (8 bits, LLM.int8()), or none (unquantized,
    in compute_dtype). The default nf4 is QLoRA's format. Use int8 or none for a base closer to the original weights
    where memory allows."""
    double_quant: bool = True
    """Quantize the block scales as well, which saves 0.4 bits per parameter. Applies to nf4 and fp4; ignored for int8
    and none."""
    scale_search: Literal["none", "mse"] = "none"
    """The choice of the scale of each block of 4-bit weights. none uses the block's absmax, its largest magnitude.
    mse searches for the scale with the least squared error: 8 % less error at the same size, but quantizing takes
    several times as long. mse requires type nf4 or fp4."""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """For type int8 only: input columns with a magnitude of at least this value are outliers and are multiplied in
    compute_dtype instead of int8; 0 turns this off."""
    skip: Texts = ()
    """Modules to keep unquantized, in compute_dtype. Names match as in diffusers: the last part of a module's path, or
    any part of it followed by a dot."""
    exact: Texts = ()
    """Full paths of layers outside the transformer blocks that compute with their full-precision weights, although
    the exported files store them quantized. Use it for layers that skip cannot name without matching others, such as
    FLUX's last layer proj_out, whose name also ends the path of a layer in every single block. The full-precision
    weights must be available in the model's folder or next to the quantized ones, where `halfbyte quantize` writes
    them."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The precision of activations and of every weight that is not quantized. bfloat16 suits GPUs; on most CPUs
    float32 is far faster."""

    @model_validator(mode="after")
    def _only_blocks_have_scales_to_search(self) -> Self:
        if self.scale_search != "none" and self.type not in ("nf4", "fp4"):
            raise conflict(
                "scale_search", f"got {self.scale_search}, expected none because quant.type is {self.type}"
            )
        return self


class LoraSection(Section):
    """The adapters: low-rank updates B A of the base's linear layers, the only weights that are trained."""

    rank: int = Field(default=16, ge=1, le=MOST_RANK)
    """The rank of the adapters: the inner dimension of A and B. A higher rank can learn more detail; parameters,
    optimizer state and file size grow in proportion."""
    alpha: float = Field(default=16, gt=0)
    """The scale of the update, which is multiplied by alpha / rank (or alpha / sqrt(rank) with rslora). The default
    equals the default rank, a factor of 1."""
    rank_pattern: Ranks = Field(default={})
    """Different ranks for some layers, such as {proj_mlp: 32}. Each key is a regular expression that matches the end
    of a module name. The first matching key wins; a key that matches no layer with an adapter is an error."""
    alpha_pattern: Alphas = Field(default={})
    """Different alphas for some layers, with keys as in rank_pattern. A layer that only rank_pattern names keeps
    lora.alpha."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), so that high ranks learn as fast as low
    ones."""
    dora: bool = False
    """Also learn the magnitude of each row of the adapted weights (DoRA). At low ranks this comes closer to full
    fine-tuning, but each step takes longer. Only this trainer's own layers compute it, so train.fused_adapters must
    be true. The adapter is then exported for diffusers only."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The probability with which each input value of an adapter is zeroed in training, from 0 to below 1. Values
    above 0 regularize small data sets, but the blocks then run layer by layer, not as one function."""
    targets: Targets = "all-linear"
    """The layers that get an adapter: all-linear (attention and MLP layers of the blocks), attention, a list of module
    names, or a regular expression that matches full module names. attention trains fewer parameters."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """The initialization of A: gaussian, as in diffusers' training scripts, or kaiming, PEFT's default. B always starts
    at zero, so that training starts from the base model's output."""
    init_from: FilePath | None = None
    """An existing adapter to start from; null starts from init. Accepts a run's folder; a file or folder in the format
    of diffusers, PEFT, ComfyUI or kohya; or a Hub repository (owner/name or owner/name@revision) with a diffusers or
    PEFT file. With a rank above the loaded adapter's, training starts from the same update. Layers that the loaded
    adapter does not have start as init says."""


class PreserveSection(Section):
    """Keeps what the base does with a caption (differential output preservation)."""

    caption: Text
    """A caption of the class that is trained on, without the trigger word, such as: a photo of a dog. The adapted model
    is trained to predict for it what the base predicts."""
    weight: float = Field(default=1.0, gt=0)
    """The factor of this part of the loss."""


class ObjectiveSection(Section):
    """The training objective: which noise levels (sigma, from 0 to 1) are trained, and how the error is measured and
    weighted."""

    timesteps: Annotated[TimestepScheme, TIMESTEPS] = LogitNormal(name="logit_normal")
    """The distribution from which the noise level of each sample is drawn."""
    shift: Annotated[Shift, SHIFTS] = ResolutionShift(name="resolution")
    """The shift of the drawn noise levels, which may depend on the image's size. Use the shift that the model
    was trained with: resolution for FLUX.1-dev, none for FLUX.1-schnell, static with 3.0 for SD3."""
    weighting: Annotated[Weighting, WEIGHTINGS] = NoWeighting(name="none")
    """The weight of each noise level in the loss."""
    loss: Annotated[Loss, LOSSES] = MSE(name="mse")
    """The distance between the predicted velocity and its target, noise - x0."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """The guidance scale given to the model in training. Only models with a guidance embedding (FLUX.1-dev) use
    it. It is independent of sample.guidance_scale."""
    preserve: PreserveSection | None = None
    """Also train the model to predict for a caption of the class what the base predicts, such as {caption: a photo of a
    dog}. A step then takes as much memory as with twice the batch size."""


class TrainSection(Section):
    """The length of the run, its batch size, and how steps are computed."""

    steps: Steps = 1000
    """The number of optimizer steps in the whole run, including those before a resume."""
    batch_size: Images | ImagesByResolution = 1
    """Images per process and micro-batch. All images of a micro-batch have one size. Activation memory grows in
    proportion. With several resolutions it may be a mapping with a number for each, such as {512: 4, 1024: 1}, so that
    all of them take about the same memory."""
    grad_accumulation: int = Field(default=1, ge=1, le=1_000_000)
    """Micro-batches per optimizer step. Each step trains on batch_size x processes x grad_accumulation images, so this
    makes larger batches without more memory. Every image of a step has the same weight in its gradient."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """The largest norm of the whole gradient; larger gradients are scaled down to it. null turns clipping off."""
    gradient_checkpointing: Literal["none", "selective", "full", "offload"] = "full"
    """The tensors that each block keeps for the backward pass; all others are computed again. none keeps everything
    that takes a matrix product to compute (fastest, most memory). selective keeps the block's inputs and attention's
    output, so that attention runs only once. full keeps only the inputs. offload keeps only the inputs too, in
    page-locked host memory (least device memory). Blocks that run layer by layer (train.fused_blocks: false) treat
    selective and offload as full."""
    attention: Literal["auto", "cudnn", "flash", "flash4", "efficient", "deterministic"] = "auto"
    """The attention kernel on CUDA. auto uses the fastest kernel whose output and gradients pass an accuracy check at
    the run's shapes; each kernel is tested in a separate process, once per device. flash4 is FlashAttention-4, the
    fastest on Hopper; it must be installed (pip install 'flash-attn-4[cu13]>=4.0.0b36'). deterministic is flash with
    a slower backward pass that gives bitwise identical gradients every time, so that a resumed run repeats exactly;
    on the CPU attention is always deterministic."""
    fused_adapters: bool = True
    """Compute each layer and its adapter as one function, which keeps less memory for the backward pass. false uses
    PEFT's own layers, whose results are the same up to rounding."""
    fused_blocks: bool = True
    """Run each transformer block as one function with its own backward pass where possible: faster, with less memory,
    and the same results up to rounding. With dropout, DoRA or an int8 base, blocks run layer by layer; so do SD3's last
    block and those blocks of SD3.5 medium that have a second attention.
    Ignored if fused_adapters is false."""
    stream_blocks: bool = False
    """Keep the quantized weights of the transformer's blocks in page-locked host memory (FLUX.1: 5.7 GB per process),
    and copy each block to the device just before it runs, twice per micro-batch. Needed on cards of 6 GB or less.
    Results are bitwise identical; the slowdown depends on the speed of the bus. Requires a quantized base and cannot
    be combined with DoRA."""
    cuda_graphs: bool = False
    """Record the kernels of a step as a CUDA graph, once per image size, and replay the graph from then on. This helps
    when the CPU launches kernels more slowly than the device runs them, as at 512 px. The kernels are the same;
    graphs recorded before training are first compared with a normal step. A step's working memory stays
    allocated, even while sample images are generated. CUDA only. Requires fused_blocks, adapters without dropout or
    DoRA and a base other than int8. Cannot be combined with stream_blocks or gradient_checkpointing: offload."""
    on_nonfinite: Annotated[OnNonFinite, NONFINITE] = Stop(name="stop")
    """What happens at a step whose loss or gradient is NaN or infinite."""
    seed: Seed = 0
    """The seed of all random numbers in training: data order, random crops, noise and the adapters' start. Sample
    images have their own, sample.seed."""

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
                raise conflict("cuda_graphs", f"got true, expected false because train.{name} is {value}")
        return self
