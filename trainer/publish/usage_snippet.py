"""Writes the code sample of a model card, which uses the pushed adapter with stock diffusers."""

from dataclasses import dataclass

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.export.provenance import Provenance
from halfbyte.trainer.publish.files import BASE
from halfbyte.trainer.recipe.data_section import instance_prompt
from halfbyte.trainer.recipe.recipe import Recipe


@dataclass(frozen=True)
class Usage:
    """The facts that the code sample is made from."""

    repository: str
    recipe: Recipe
    provenance: Provenance
    has_base: bool


def usage_sample(usage: Usage) -> str:
    """Returns a Python program that generates the run's first sample again, with the same prompt, seed and settings."""
    provenance, dtype = usage.provenance, usage.recipe.quant.compute_dtype
    parts = _parts(usage)
    text_encoders = [name for name in parts if name != BASE]
    pinned = "" if provenance.revision is None else f"    revision={_literal(provenance.revision)},\n"
    return (
        "import torch\n"
        f"from diffusers import {provenance.pipeline}"
        + (f", {provenance.transformer}" if BASE in parts else "")
        + ("\nfrom transformers import T5EncoderModel" if text_encoders else "")
        + "\n\n"
        'device = "cuda" if torch.cuda.is_available() else "cpu"\n'
        + "".join(
            _part(name, provenance.transformer if name == BASE else "T5EncoderModel", part, dtype)
            for name, part in parts.items()
        )
        + f"pipeline = {provenance.pipeline}.from_pretrained(\n"
        + _base(provenance)
        + pinned
        + "".join(f"    {name}={name},\n" for name in parts)
        + f"    torch_dtype=torch.{dtype},\n"
        ").to(device)\n"
        f"pipeline.load_lora_weights({_literal(usage.repository)}, weight_name={_literal(ADAPTER_FILE)})\n"
        + _call(usage.recipe, provenance.max_sequence_length)
        + 'image.save("image.png")\n'
    )


def _parts(usage: Usage) -> dict[str, tuple[str, ...]]:
    """Returns the components that do not come from the base.

    Maps each component's name in the pipeline to the `from_pretrained` arguments that locate it.
    """
    parts = {}
    for name, part in usage.provenance.parts.items():
        subfolder = () if part.subfolder is None else (f"subfolder={_literal(part.subfolder)}",)
        parts[name] = (_literal(part.repository), *subfolder, f"revision={_literal(part.revision)}")
    if usage.has_base:
        parts[BASE] = (_literal(usage.repository), f"subfolder={_literal(BASE)}")
    return parts


def _part(name: str, class_name: str, where: tuple[str, ...], dtype: str) -> str:
    argument = (
        "torch_dtype" if name == BASE else "dtype"
    )  # diffusers calls it torch_dtype, transformers dtype
    arguments = ", ".join((*where, f"{argument}=torch.{dtype}"))
    return f"{name} = {class_name}.from_pretrained(\n    {arguments}\n)\n"


def _base(provenance: Provenance) -> str:
    if provenance.base_model is None:
        return '    "path/to/the/base",  # the pipeline that the adapter was trained with\n'
    return f"    {_literal(provenance.base_model)},\n"


def _call(recipe: Recipe, tokens: int) -> str:
    sample = recipe.sample
    prompt = sample.prompts[0] if sample.prompts else f"{instance_prompt(recipe.data)} a picture".strip()
    return (
        "image = pipeline(\n"
        f"    {_literal(prompt)},\n"
        f"    num_inference_steps={sample.steps},\n"
        f"    guidance_scale={sample.guidance_scale:g},\n"
        f"    width={sample.width},\n"
        f"    height={sample.height},\n"
        f"    max_sequence_length={tokens},\n"
        f"    generator=torch.Generator().manual_seed({sample.seed}),\n"
        ").images[0]\n"
    )


def _literal(text: str) -> str:
    """Returns the text as a one-line Python literal of printable characters, in double quotes if it has no quotes."""
    literal = repr(text)
    return literal if '"' in text or "'" in text else f'"{literal[1:-1]}"'
