"""The code sample of a model card: what is pushed, used by stock diffusers."""

from dataclasses import dataclass

from halfbyte.trainer.checkpoint import ADAPTER_FILE
from halfbyte.trainer.provenance import Provenance
from halfbyte.trainer.push_files import BASE
from halfbyte.trainer.recipe import Recipe


@dataclass(frozen=True)
class Usage:
    """What the sample depends on."""

    repository: str
    recipe: Recipe
    provenance: Provenance
    has_base: bool


def usage_sample(usage: Usage) -> str:
    """A Python program. The prompt is the first that was drawn in training, with its seed and settings."""
    provenance, dtype = usage.provenance, usage.recipe.quant.compute_dtype
    pinned = "" if provenance.revision is None else f"    revision={_literal(provenance.revision)},\n"
    return (
        "import torch\n"
        f"from diffusers import {provenance.pipeline}"
        + (f", {provenance.transformer}" if usage.has_base else "")
        + "\n\n"
        'device = "cuda" if torch.cuda.is_available() else "cpu"\n'
        + (_transformer(usage.repository, provenance.transformer, dtype) if usage.has_base else "")
        + f"pipeline = {provenance.pipeline}.from_pretrained(\n"
        + _base(provenance)
        + pinned
        + ("    transformer=transformer,\n" if usage.has_base else "")
        + f"    torch_dtype=torch.{dtype},\n"
        ").to(device)\n"
        f"pipeline.load_lora_weights({_literal(usage.repository)}, weight_name={_literal(ADAPTER_FILE)})\n"
        + _call(usage.recipe, provenance.max_sequence_length)
        + 'picture.save("picture.png")\n'
    )


def _transformer(repository: str, name: str, dtype: str) -> str:
    return (
        f"transformer = {name}.from_pretrained(\n"
        f"    {_literal(repository)}, subfolder={_literal(BASE)}, torch_dtype=torch.{dtype}\n"
        ")\n"
    )


def _base(provenance: Provenance) -> str:
    if provenance.base_model is None:
        return '    "path/to/the/base",  # the pipeline that the adapter was trained on\n'
    return f"    {_literal(provenance.base_model)},\n"


def _call(recipe: Recipe, tokens: int) -> str:
    sample = recipe.sample
    prompt = sample.prompts[0] if sample.prompts else f"{recipe.data.caption_prefix}a picture"
    return (
        "picture = pipeline(\n"
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
    """Python's literal of the text, in one line of printable characters; in double quotes where it has no quotes."""
    literal = repr(text)
    return literal if '"' in text or "'" in text else f'"{literal[1:-1]}"'
