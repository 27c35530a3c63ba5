"""Defines `Family`: everything that differs between models, behind one interface.

A `Family` reads configurations and describes the model. It loads no weights. The functions that load are
`load_base` in `trainer/denoiser/base.py` (the frozen transformer) and `load_encoders` in
`trainer/families/encoders.py` (VAE and text encoders); both take a `Family`.

To add a family, write a folder next to `flux` and `sd3` with the same files (`family.py`, `blocks.py`,
`attention.py`, `names.py`), implement the abstract methods below, and register it in `catalog.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedModel, T5EncoderModel

from halfbyte.quant.files.digest import file_digest
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, WEIGHTS_FILE
from halfbyte.quant.load.check import check_model
from halfbyte.quant.load.serialize import CONFIG_FILE
from halfbyte.quant.load.text_encoder import check_text_encoder
from halfbyte.quant.load.transformer import read_config
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.requirements import (
    clip_components,
    part_classes,
    require_configurations,
    tokenizer_classes,
)
from halfbyte.trainer.families.tokenizing import check_tokenizer_files
from halfbyte.trainer.pretrained.component import PIPELINE, Component, find_component, pipelines_component
from halfbyte.trainer.pretrained.fields import Kind
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.layer_names import OriginalName
from halfbyte.trainer.pretrained.pipeline import ModelSource, resolve, resolve_configurations


class Family(ABC):
    """One kind of model, such as FLUX or SD3, opened at a pipeline folder.

    Describes the model from its configurations; loads no weights (see the top of this module for what does).
    """

    pipeline_class: ClassVar[type[Any]]
    denoiser_class: ClassVar[type[Any]]
    text_components: ClassVar[tuple[str, ...]]
    t5_component: ClassVar[str]
    clip_class: ClassVar[type[PreTrainedModel]]  # of all text encoders except T5
    clip_advice: ClassVar[str]  # says what to do about captions that CLIP cuts
    denoiser_fields: ClassVar[
        Mapping[str, Kind]
    ]  # values that the family reads besides those of every family
    max_references: ClassVar[int] = 0  # reference images for one image that the model takes
    # The recipe's target presets: regular expressions that must match a module's full name.
    target_presets: ClassVar[dict[str, str]]

    @classmethod
    def components(cls, *, own_t5: bool = False) -> tuple[str, ...]:
        """Returns the pipeline components that training reads; own_t5: T5 comes from elsewhere."""
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
        """Opens the family at a folder or Hub repository and checks that all its files are there.

        transformer, text_encoder: where these weights come from instead, see `take_transformer`.

        Raises:
            RecipeError, HubError: see `pipeline.resolve` and `find_component`. A large file that is missing
                or truncated is an error here, not after an hour of encoding.
        """
        family = cls.describe(path, revision, max_sequence_length, transformer, text_encoder)
        family.source = resolve(
            path,
            family.source.revision,
            cls.components(own_t5=text_encoder is not None),
            cls.denoiser_class.__name__,
            () if transformer is None else ("transformer",),
        )
        family.require_weights()
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
        """Opens the family without its weights. From the Hub, it fetches only a few small files."""
        needed, denoiser = cls.components(own_t5=text_encoder is not None), cls.denoiser_class.__name__
        source = resolve_configurations(path, revision, needed, denoiser)
        if source.revision is None:
            source.require(needed, denoiser, () if transformer is None else ("transformer",))
        source.require_classes(
            part_classes(
                cls.text_components, cls.t5_component, cls.clip_class, own_t5=text_encoder is not None
            )
        )
        family = cls(source, max_sequence_length)
        if transformer is not None:
            family.take_transformer(transformer)
        if text_encoder is not None:
            family.take_text_encoder(text_encoder)
        return family

    def __init__(self, source: ModelSource, max_sequence_length: int | None) -> None:
        require_configurations(source, self.denoiser_fields)
        self.source = source
        self.denoiser_config = source.config("transformer")
        self.vae_config = source.config("vae")
        self.scheduler_config = source.config("scheduler")
        self.transformer = pipelines_component(source, "transformer", WEIGHTS_FILE)
        self.vae = pipelines_component(source, "vae", WEIGHTS_FILE)
        self.clips = {
            part: pipelines_component(source, part, TEXT_WEIGHTS_FILE)
            for part in clip_components(self.text_components, self.t5_component)
        }
        self.t5 = pipelines_component(source, self.t5_component, TEXT_WEIGHTS_FILE)
        self.max_sequence_length = max_sequence_length or self.default_sequence_length()

    def require_weights(self) -> None:
        """Checks all weights from the headers of their files: every tensor is there, in the model's shape.

        Downloads weights that a setting names and that are missing. Checks that the tokenizers have their
        files, too.

        Raises:
            HubError: A download failed.
            RecipeError: A file is missing or damaged, or does not fit the model's configuration.
        """
        for component in (self.transformer, self.vae, *self.clips.values(), self.t5):
            component.require_weights()
        if self.transformer.file is None:  # a single file was checked when it was found
            with blame(self.transformer):
                check_model(self.denoiser_class, self.transformer.path)
        with blame(self.vae):
            check_model(AutoencoderKL, self.vae.path)
        for clip in self.clips.values():
            with blame(clip):
                check_text_encoder(self.clip_class, clip.path)
        with blame(self.t5):
            check_text_encoder(T5EncoderModel, self.t5.path)
        for name, tokenizer_cls in tokenizer_classes(self.text_components, self.t5_component).items():
            check_tokenizer_files(tokenizer_cls, self.source.folder / name)

    def take_transformer(self, named: Path) -> None:
        """Takes the transformer's weights from `named` instead of the pipeline.

        named: a folder in diffusers' layout, quantized or not; a Hub repository (see `HubReference`), of
        which only the configuration is fetched here; or a single file with the layer names of the model's
        authors.

        Raises:
            HubError: the repository cannot be read.
            RecipeError: the weights are damaged or belong to another model, or `named` is a single file and
                this family reads none.
        """
        found = find_component("model.transformer", named, "transformer", WEIGHTS_FILE)
        with blame(found):
            if found.file is not None:
                self.check_file(found.file)
            else:
                self.denoiser_config = self._config_of(found.path)
        self.transformer = found

    def take_text_encoder(self, named: Path) -> None:
        """Takes T5 from a folder or Hub repository instead of the pipeline; see `take_transformer`."""
        found = find_component("model.text_encoder", named, self.t5_component, TEXT_WEIGHTS_FILE)
        with blame(found):
            self._check_t5(found.path)
        self.t5 = found

    def check_file(self, file: Path) -> None:
        """Raises ValueError if the transformer cannot be read from this single file."""
        raise ValueError(
            f"{file}: got a single file, which only the family flux can read; expected null, a folder in"
            " diffusers' layout, or a Hub repository"
        )

    def _config_of(self, folder: Path) -> dict[str, Any]:
        """Returns the configuration of a transformer that replaces the pipeline's.

        Raises:
            ValueError: the two configurations differ in more than their quantization.
        """
        config = read_config(folder, self.denoiser_class.__name__)
        own = self.denoiser_config
        for key in own.keys() & config.keys():
            if not key.startswith("_") and key != "quantization_config" and config[key] != own[key]:
                raise ValueError(
                    f"{folder / CONFIG_FILE}: {key} is {config[key]}, but {own[key]} in the configuration of"
                    " model.path; expected a transformer of the same model"
                )
        return config

    def _check_t5(self, folder: Path) -> None:
        """Raises ValueError unless the folder holds a T5 whose embeddings fit the transformer."""
        config = read_config(folder)
        kind = config.get("model_type")
        if kind != "t5":
            described = config.get("_class_name") or next(iter(config.get("architectures") or ()), kind)
            raise ValueError(f"{folder / CONFIG_FILE}: describes a {described}, expected a T5EncoderModel")
        width, taken = config.get("d_model"), self.denoiser_config.get("joint_attention_dim")
        if taken is not None and width != taken:
            raise ValueError(
                f"{folder / CONFIG_FILE}: this T5's embeddings are {width} wide, but the transformer takes"
                f" {taken}; expected the T5 of the same model"
            )

    @abstractmethod
    def default_sequence_length(self) -> int:
        """Returns how many T5 tokens a caption is padded to if the recipe does not set it."""

    @property
    def denoiser_folder(self) -> Path | None:
        """The folder of the transformer's weights in diffusers' layout; None if they are in a single file."""
        return None if self.transformer.file is not None else self.transformer.path

    @property
    def commits(self) -> dict[str, str]:
        """The commit of each Hub repository the family was opened at, by the setting that names it."""
        revisions = {
            PIPELINE: self.source.revision,
            **{part.setting: part.revision for part in (self.transformer, self.t5) if part.is_own},
        }
        return {setting: commit for setting, commit in revisions.items() if commit is not None}

    def denoiser_fingerprint(self, digests: FileDigests) -> str:
        """Returns a string that identifies the transformer's weights."""
        if self.transformer.is_own:
            return self.transformer.fingerprint(digests)
        return self.source.fingerprint(["transformer"], digests)

    def t5_fingerprint(self, digests: FileDigests) -> str:
        """Returns a string that identifies the weights of a T5 from elsewhere (`take_text_encoder`)."""
        config = self.t5.path / CONFIG_FILE
        return f"{file_digest(config)}:{self.t5.fingerprint(digests)}"

    def text_fingerprint(self, digests: FileDigests) -> str:
        """Returns a string that identifies the weights of the text encoders and the tokenizers."""
        if not self.t5.is_own:
            return self.source.fingerprint(self.text_components, digests)
        others = [part for part in self.text_components if part != self.t5_component]
        return f"{self.source.fingerprint(others, digests)}:{self.t5_fingerprint(digests)}"

    def describe_source(self) -> str:
        """Describes where the weights come from, for the log at the start of a run."""
        at = f" @ {self.source.revision[:12]}" if self.source.revision else ""
        parts = (("transformer", self.transformer), ("T5", self.t5))
        own = [f"; {name} of {part}" for name, part in parts if part.is_own]
        return f"{self.source.name}{at}{''.join(own)}"

    @property
    def vae_scale(self) -> int:
        """Pixels per latent pixel along one side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this: the VAE's scale times the denoiser's patch size, 2."""
        return self.vae_scale * 2

    @property
    def largest_side(self) -> int | None:
        """The longest image side in pixels that the denoiser accepts; None: no limit."""
        return None

    @property
    def text_tokens(self) -> int:
        """Number of text tokens per caption that the denoiser sees."""
        return self.max_sequence_length

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Number of attention heads, and the dimension of each."""
        return self.denoiser_config["num_attention_heads"], self.denoiser_config["attention_head_dim"]

    def image_tokens(self, height: int, width: int) -> int:
        """Returns how many tokens the denoiser makes of a latent of this size, given in latent pixels."""
        return (height // 2) * (width // 2)

    @abstractmethod
    def fuse_blocks(self, denoiser: nn.Module, settings: BlockSettings) -> None:
        """Makes the blocks of a denoiser with adapters run as `settings` says, with checkpointing or without.

        Changes nothing else: outputs are the same up to rounding, parameters keep their values and names.
        """

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Shifts and scales the VAE's latents for the denoiser, by the VAE's config; fp32."""
        return (latents - self.vae_config["shift_factor"]) * self.vae_config["scaling_factor"]

    def representable(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the sigma that reaches the denoiser when it computes in `dtype`, as fp32.

        Training mixes noise and latents with this value, so the noise level matches the timestep input
        exactly.
        """
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
        """Returns the predicted velocity, noise - x0, in noisy's shape.

        denoiser: the transformer or a stand-in for it; takes keyword arguments and returns a tuple.
        noisy: (B, C, H/8, W/8) in the compute dtype. sigma: (B,) fp32 in (0, 1].
        """

    @abstractmethod
    def embed(self, pipeline: Any, captions: list[str], device: torch.device) -> TextEmbedding:
        """Encodes captions with the stock pipeline, without the negative half of classifier-free guidance."""

    @abstractmethod
    def original_names(self) -> tuple[OriginalName, ...]:
        """Returns the layers' names in the authors' checkpoints, which ComfyUI and kohya use too."""

    @abstractmethod
    def block_kinds(self) -> tuple[tuple[str, ...], ...]:
        """Returns the names of the transformer's blocks, one group per kind, each in the model's order."""

    @abstractmethod
    def config_of_blocks(self, blocks: Sequence[str]) -> dict[str, Any]:
        """Returns the configuration of a transformer with only these blocks, at least one of each kind."""

    def lora_targets(self, targets: str) -> str:
        """Returns a preset's regular expression over module names; returns any other text unchanged."""
        return self.target_presets.get(targets, targets)

    def sampling_inputs(self, text: TextEmbedding, empty: TextEmbedding) -> dict[str, Tensor]:
        """Returns the stock pipeline's text arguments for one caption; `empty` embeds the empty caption."""
        return {"prompt_embeds": text.prompt_embeds, "pooled_prompt_embeds": text.pooled_prompt_embeds}

    def decodable(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        """Converts the pipeline's output latents to the VAE's input (B, C, H/8, W/8); sizes in pixels."""
        scaled: Tensor = latents / self.vae_config["scaling_factor"]
        return scaled + self.vae_config["shift_factor"]

    def describe_guidance(self, guidance_scale: float) -> str:
        """Describes how the recipe's guidance_scale is used, for the log at the start of a run."""
        return "not used: the model has no guidance embedding"


@contextmanager
def blame(component: Component) -> Iterator[None]:
    """Turns a ValueError in the context into a RecipeError that names the component's setting."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{component.setting}: {error}") from error
