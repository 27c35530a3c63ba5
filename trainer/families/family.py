"""What a model family is: everything that differs between models, behind one interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from halfbyte.quant.files.digest import file_digest
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, WEIGHTS_FILE
from halfbyte.quant.load.serialize import CONFIG_FILE
from halfbyte.quant.load.transformer import read_config
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.pretrained.component import PIPELINE, Component, find_component, pipelines_component
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.layer_names import OriginalName
from halfbyte.trainer.pretrained.pipeline import ModelSource, resolve, resolve_configurations


class Family(ABC):
    """One kind of model, opened at a pipeline folder; configurations are read at once, weights when asked for."""

    pipeline_class: ClassVar[type[Any]]
    denoiser_class: ClassVar[type[Any]]
    text_components: ClassVar[tuple[str, ...]]
    t5_component: ClassVar[str]
    # Patterns (full match on a module's name) behind the recipe's target presets.
    target_presets: ClassVar[dict[str, str]]

    @classmethod
    def components(cls, *, own_t5: bool = False) -> tuple[str, ...]:
        """Every part of the pipeline folder that training reads; own_t5: T5 is elsewhere."""
        parts = ("transformer", "vae", *cls.text_components, "scheduler")
        return tuple(part for part in parts if not own_t5 or part != cls.t5_component)

    @classmethod
    def open(
        cls,
        path: str,
        revision: str | None,
        max_sequence_length: int | None,
        transformer: Path | None = None,
        text_encoder: Path | None = None,
    ) -> Self:
        """The family at a folder or Hub repository, its transformer's weights and its T5 from elsewhere if given.

        Raises RecipeError or HubError, see `source.resolve` and `component.find`; a large file that is missing or cut
        short is told here, and not when an hour of encoding is over.
        """
        family = cls.describe(path, revision, max_sequence_length, transformer, text_encoder)
        family.source = resolve(
            path,
            family.source.revision,
            cls.components(own_t5=text_encoder is not None),
            cls.denoiser_class.__name__,
            () if transformer is None else ("transformer",),
        )
        for component in (family.transformer, family.t5):
            component.require_weights()
        return family

    @classmethod
    def describe(
        cls,
        path: str,
        revision: str | None,
        max_sequence_length: int | None,
        transformer: Path | None = None,
        text_encoder: Path | None = None,
    ) -> Self:
        """As `open`, from configurations alone: of Hub repositories a few small files are fetched."""
        needed, denoiser = cls.components(own_t5=text_encoder is not None), cls.denoiser_class.__name__
        source = resolve_configurations(path, revision, needed, denoiser)
        if source.revision is None:
            source.require(needed, denoiser, () if transformer is None else ("transformer",))
        family = cls(source, max_sequence_length)
        if transformer is not None:
            family.take_transformer(transformer)
        if text_encoder is not None:
            family.take_text_encoder(text_encoder)
        return family

    def __init__(self, source: ModelSource, max_sequence_length: int | None) -> None:
        self.source = source
        self.denoiser_config = source.config("transformer")
        self.vae_config = source.config("vae")
        self.scheduler_config = source.config("scheduler")
        self.transformer = pipelines_component(source, "transformer", WEIGHTS_FILE)
        self.t5 = pipelines_component(source, self.t5_component, TEXT_WEIGHTS_FILE)
        self.max_sequence_length = max_sequence_length or self.default_sequence_length()

    def take_transformer(self, named: Path) -> None:
        """Has the transformer's weights come from elsewhere than the pipeline.

        named: a folder in diffusers' layout, quantized or not; a Hub repository, see `HubReference`, of which the
        configuration alone is fetched; or one file that names layers as the model's authors do. Raises HubError, and
        RecipeError where it is another model's, damaged, or a file of a family that has no such files.
        """
        found = find_component("model.transformer", named, "transformer", WEIGHTS_FILE)
        with blame(found):
            if found.file is not None:
                self.check_file(found.file)
            else:
                self.denoiser_config = self._config_of(found.path)
        self.transformer = found

    def take_text_encoder(self, named: Path) -> None:
        """Has T5 come from elsewhere than the pipeline: a folder or a Hub repository, see `take_transformer`."""
        found = find_component("model.text_encoder", named, self.t5_component, TEXT_WEIGHTS_FILE)
        with blame(found):
            self._check_t5(found.path)
        self.t5 = found

    def check_file(self, file: Path) -> None:
        """Raises ValueError where a transformer cannot be read from this one file."""
        raise ValueError(
            f"{file}: single files are read for flux alone; expected null, or a folder in diffusers' layout"
        )

    def _config_of(self, folder: Path) -> dict[str, Any]:
        """The configuration of a transformer that stands in for the source's. Raises ValueError."""
        config = read_config(folder, self.denoiser_class.__name__)
        own = self.denoiser_config
        for key in own.keys() & config.keys():
            if not key.startswith("_") and key != "quantization_config" and config[key] != own[key]:
                raise ValueError(
                    f"{folder / CONFIG_FILE}: {key} is {config[key]}, and {own[key]} in that of model.path; expected a"
                    " transformer of the same model"
                )
        return config

    def _check_t5(self, folder: Path) -> None:
        """Raises ValueError where a folder holds no T5 whose embeddings the transformer takes."""
        config = read_config(folder)
        kind = config.get("model_type")
        if kind != "t5":
            described = config.get("_class_name") or next(iter(config.get("architectures") or ()), kind)
            raise ValueError(f"{folder / CONFIG_FILE}: describes a {described}, expected a T5EncoderModel")
        width, taken = config.get("d_model"), self.denoiser_config.get("joint_attention_dim")
        if taken is not None and width != taken:
            raise ValueError(
                f"{folder / CONFIG_FILE}: its embeddings are {width} wide, and the transformer takes {taken}; expected"
                " the T5 of the same model"
            )

    @abstractmethod
    def default_sequence_length(self) -> int:
        """T5 tokens a caption is padded to when the recipe does not say."""

    @property
    def denoiser_folder(self) -> Path | None:
        """The folder of the transformer's weights, in diffusers' layout; None where one file holds them."""
        return None if self.transformer.file is not None else self.transformer.path

    @property
    def commits(self) -> dict[str, str]:
        """The commits of the Hub repositories that it was opened at, by the settings that name them."""
        revisions = {
            PIPELINE: self.source.revision,
            **{part.setting: part.revision for part in (self.transformer, self.t5) if part.is_own},
        }
        return {setting: commit for setting, commit in revisions.items() if commit is not None}

    def denoiser_fingerprint(self, digests: FileDigests) -> str:
        """What tells the transformer's weights from all others."""
        if self.transformer.is_own:
            return self.transformer.fingerprint(digests)
        return self.source.fingerprint(["transformer"], digests)

    def t5_fingerprint(self, digests: FileDigests) -> str:
        """What tells a T5 that was given apart from all others."""
        config = self.t5.path / CONFIG_FILE
        return f"{file_digest(config)}:{self.t5.fingerprint(digests)}"

    def text_fingerprint(self, digests: FileDigests) -> str:
        """What tells the text encoders and tokenizers from all others."""
        if not self.t5.is_own:
            return self.source.fingerprint(self.text_components, digests)
        others = [part for part in self.text_components if part != self.t5_component]
        return f"{self.source.fingerprint(others, digests)}:{self.t5_fingerprint(digests)}"

    def describe_source(self) -> str:
        """Where everything is from, for the start of the run."""
        at = f" @ {self.source.revision[:12]}" if self.source.revision else ""
        parts = (("transformer", self.transformer), ("T5", self.t5))
        own = [f"; {name} of {part}" for name, part in parts if part.is_own]
        return f"{self.source.name}{at}{''.join(own)}"

    @property
    def vae_scale(self) -> int:
        """Pixels a latent pixel stands for, along one side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Picture sides are multiples of this: the VAE's scale times the denoiser's patch of two."""
        return self.vae_scale * 2

    @property
    def largest_side(self) -> int | None:
        """Pixels: the longest side of a picture that the denoiser takes; None: any."""
        return None

    @property
    def text_tokens(self) -> int:
        """Tokens of a caption that the denoiser sees."""
        return self.max_sequence_length

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Heads of the joint attention, and the dimension of each."""
        return self.denoiser_config["num_attention_heads"], self.denoiser_config["attention_head_dim"]

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens the denoiser sees of a latent of this size (latent pixels)."""
        return (height // 2) * (width // 2)

    @abstractmethod
    def fuse_blocks(self, denoiser: nn.Module, settings: BlockSettings) -> None:
        """Have the blocks of a denoiser with adapters run as `settings` says, gradient checkpointing included.

        Nothing else changes: outputs (up to rounding), parameters and their names stay.
        """

    def scale_latents(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the denoiser sees them, by the VAE's own config; fp32."""
        return (latents - self.vae_config["shift_factor"]) * self.vae_config["scaling_factor"]

    def representable(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """The sigma that the denoiser is told in `dtype`, so that noise and timestep are one number; fp32."""
        return sigma.float()

    @abstractmethod
    def predict(
        self,
        denoiser: Callable[..., Any],
        noisy: Tensor,
        sigma: Tensor,
        text: TextEmbedding,
        guidance_scale: float,
    ) -> Tensor:
        """The predicted velocity, noise - x0.

        denoiser: the transformer, or what is called in its place: with inputs by name, for a tuple.
        noisy: (B, C, H/8, W/8) in the compute dtype; sigma: (B,) fp32 in (0, 1]. Returns noisy's shape.
        """

    @abstractmethod
    def embed(self, pipeline: Any, captions: list[str], device: torch.device) -> TextEmbedding:
        """Calls the stock pipeline's text encoding, without classifier-free guidance's negative half."""

    @abstractmethod
    def original_names(self) -> tuple[OriginalName, ...]:
        """The layers as the model's authors name them, which ComfyUI and kohya keep to."""

    @abstractmethod
    def block_kinds(self) -> tuple[tuple[str, ...], ...]:
        """The names of the transformer's blocks, those that are alike together, each kind in the model's order."""

    @abstractmethod
    def config_of_blocks(self, blocks: Sequence[str]) -> dict[str, Any]:
        """The configuration of a transformer that has these blocks alone; one of each kind at least."""

    def lora_targets(self, targets: str) -> str:
        """A regular expression over module names: the one a preset stands for, or the one that was given."""
        return self.target_presets.get(targets, targets)

    def sampling_inputs(self, text: TextEmbedding, empty: TextEmbedding) -> dict[str, Tensor]:
        """What the stock pipeline is called with for one caption; `empty` is the empty caption's embedding."""
        return {"prompt_embeds": text.prompt_embeds, "pooled_prompt_embeds": text.pooled_prompt_embeds}

    def decodable(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        """What the VAE decodes, (B, C, H/8, W/8), of what the stock pipeline gives as its latents; sizes in pixels."""
        scaled: Tensor = latents / self.vae_config["scaling_factor"]
        return scaled + self.vae_config["shift_factor"]

    def describe_guidance(self, guidance_scale: float) -> str:
        """What is made of the recipe's guidance_scale, for the start of the run."""
        return "not used: the model has no guidance embedding"


@contextmanager
def blame(component: Component) -> Iterator[None]:
    """Within it a ValueError becomes a RecipeError of the setting that names the component."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{component.setting}: {error}") from error
