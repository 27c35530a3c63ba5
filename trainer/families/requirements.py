"""The classes and configuration values that the components of a pipeline must have."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTokenizer, PreTrainedModel, T5EncoderModel, T5Tokenizer

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.component import PIPELINE
from halfbyte.trainer.pretrained.fields import (
    COUNT,
    FACTOR,
    NUMBER,
    OPTIONAL_COUNT,
    OPTIONAL_FLAG,
    OPTIONAL_NUMBER,
    WIDTHS,
    Kind,
    require_fields,
)
from halfbyte.trainer.pretrained.pipeline import ModelSource

_DENOISER: Mapping[str, Kind] = {
    "in_channels": COUNT,
    "num_layers": COUNT,
    "num_attention_heads": COUNT,
    "attention_head_dim": COUNT,
    "joint_attention_dim": COUNT,
    "pooled_projection_dim": COUNT,
}
_VAE: Mapping[str, Kind] = {
    "latent_channels": COUNT,
    "block_out_channels": WIDTHS,
    "scaling_factor": FACTOR,
    "shift_factor": NUMBER,
}
_SCHEDULER: Mapping[str, Kind] = {
    "num_train_timesteps": OPTIONAL_COUNT,
    "shift": OPTIONAL_NUMBER,
    "use_dynamic_shifting": OPTIONAL_FLAG,
    "base_shift": OPTIONAL_NUMBER,
    "max_shift": OPTIONAL_NUMBER,
    "base_image_seq_len": OPTIONAL_COUNT,
    "max_image_seq_len": OPTIONAL_COUNT,
    "shift_terminal": OPTIONAL_NUMBER,
}


def require_configurations(source: ModelSource, denoiser: Mapping[str, Kind]) -> None:
    """Checks the values that the trainer reads from a pipeline's configurations.

    denoiser: values of the transformer that this family reads besides those of every family.

    Raises:
        RecipeError: A value is missing or wrong, or the scheduler is of another class.
    """
    for component, kinds in (
        ("transformer", {**_DENOISER, **denoiser}),
        ("vae", _VAE),
        ("scheduler", _SCHEDULER),
    ):
        require_fields(source.config(component), f"{PIPELINE}: {source.config_file(component)}", kinds)
    build_scheduler(source)


def build_scheduler(source: ModelSource) -> FlowMatchEulerDiscreteScheduler:
    """Builds the scheduler of a pipeline.

    Raises:
        RecipeError: It is of another class, or its configuration is damaged.
    """
    file, config = source.config_file("scheduler"), source.config("scheduler")
    found = config.get("_class_name", FlowMatchEulerDiscreteScheduler.__name__)
    if found != FlowMatchEulerDiscreteScheduler.__name__:
        raise RecipeError(
            f"{PIPELINE}: {file}: _class_name is {found!r:.80}, expected {FlowMatchEulerDiscreteScheduler.__name__},"
            " the scheduler that the model was trained with; download the scheduler's folder of the original model"
        )
    try:
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    except Exception as error:  # diffusers hardly checks the values, so a wrong one can cause any exception
        raise RecipeError(f"{PIPELINE}: {file}: no scheduler can be built from it: {error}") from error
    return scheduler


def clip_components(text_components: Sequence[str], t5: str) -> tuple[str, ...]:
    """Returns the components that are CLIP text encoders."""
    return tuple(part for part in text_components if part.startswith("text_encoder") and part != t5)


def tokenizer_of(text_encoder: str) -> str:
    """Returns the component that is the tokenizer of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def tokenizer_classes(text_components: Sequence[str], t5: str) -> dict[str, type[Any]]:
    """Returns the class of each tokenizer by its component."""
    return {
        part: T5Tokenizer if part == tokenizer_of(t5) else CLIPTokenizer
        for part in text_components
        if part.startswith("tokenizer")
    }


def part_classes(
    text_components: Sequence[str], t5: str, clip_class: type[PreTrainedModel], *, own_t5: bool
) -> dict[str, str]:
    """Returns the names of the classes that a pipeline must list for its components, except the transformer.

    own_t5: T5 comes from elsewhere, so the pipeline may list none or another one.
    """
    return {
        **dict.fromkeys(clip_components(text_components, t5), clip_class.__name__),
        **({} if own_t5 else {t5: T5EncoderModel.__name__}),
        **{part: found.__name__ for part, found in tokenizer_classes(text_components, t5).items()},
        "vae": AutoencoderKL.__name__,
        "scheduler": FlowMatchEulerDiscreteScheduler.__name__,
    }
