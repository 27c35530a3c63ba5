"""Writes the model card of a run: the adapter, its samples, how to use it and how it was trained.

A card states only facts of the run. Prompts and captions are escaped, so they cannot become markup, and a
card never contains a path of this machine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from halfbyte.quant.load.base_error import BaseError
from halfbyte.trainer.adapters.formats import PEFT_FILE
from halfbyte.trainer.denoiser.settings import quant_recipe
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.provenance import Provenance
from halfbyte.trainer.hub.reference import HubPart, HubReference, is_folder
from halfbyte.trainer.publish.files import BASE, PushFile, SamplePicture
from halfbyte.trainer.publish.markdown import escaped, fenced, table
from halfbyte.trainer.publish.usage_snippet import Usage, usage_sample
from halfbyte.trainer.recipe.data_section import common_prefix, common_trigger, instance_prompt
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.recipe.yaml12 import RecipeDumper
from halfbyte.trainer.run_folder.folder import RunFolder


@dataclass(frozen=True)
class ValidationSummary:
    """The loss on held-out images before and after training."""

    pictures: int
    base: float
    trained: float


@dataclass(frozen=True)
class CardFacts:
    """The facts that the model card of one push is made from."""

    repository: str
    recipe: Recipe
    provenance: Provenance
    names: tuple[str, ...]  # the other files of the push
    pictures: tuple[SamplePicture, ...]
    base_error: BaseError | None
    validation: ValidationSummary | None  # only for a finished run


def model_card(facts: CardFacts) -> str:
    """Returns the repository's README.md. The same facts always give the same text."""
    has_base = any(name.startswith(f"{BASE}/") for name in facts.names)
    usage = Usage(facts.repository, facts.recipe, facts.provenance, has_base)
    parts = [
        front_matter(facts),
        f"# {escaped(facts.repository.partition('/')[2])}\n",
        _introduction(facts),
        _samples(facts),
        _usage(usage, facts),
        _training(facts),
        _base(facts) if has_base else "",
        _licence(facts),
    ]
    return "\n".join(part for part in parts if part)


def _introduction(facts: CardFacts) -> str:
    base, revision = facts.provenance.base_model, facts.provenance.revision
    if base is None:
        model = "a base model that was a local folder during training"
    else:
        model = _at(HubPart(base, str(revision)))
    text = (
        f"A {_kind(facts.recipe)} for {model}, trained with halfbyte {escaped(facts.provenance.halfbyte)}.\n"
    )
    text += _other_sources(facts.provenance)
    if word := common_trigger(facts.recipe.data):
        text += f"\nTrigger word: {escaped(word)}\n"
    if prompt := common_prefix(facts.recipe.data):
        text += f"\nAll training captions start with: {escaped(prompt)}\n"
    return text


def _resolution(recipe: Recipe) -> str:
    sets = recipe.data.resolved_sets
    resolutions = sorted({resolution for given in sets for resolution in given.resolutions})
    buckets = " (buckets)" if any(given.aspect_buckets for given in sets) else ""
    return ", ".join(map(str, resolutions)) + buckets


def _at(part: HubPart) -> str:
    page = f"https://huggingface.co/{part.repository}"
    return (
        f"[{escaped(part.repository)}]({page}) at revision [`{part.revision}`]({page}/tree/{part.revision})"
    )


def _other_sources(provenance: Provenance) -> str:
    """Lists the parts that do not come from the base model."""
    own = {"transformer": (provenance.own_transformer, "transformer", "a local folder or file")}
    t5 = next((name for name in provenance.parts if name != "transformer"), "text_encoder")
    own[t5] = (provenance.own_text_encoder, "text encoder T5", "a local folder")
    text = ""
    for name, (is_own, title, origin) in own.items():
        if is_own:
            part = provenance.parts.get(name)
            origin = origin if part is None else _at(part)
            text += f"\nThe {title} does not come from this base model, but from {origin}.\n"
    if provenance.started_from is not None:
        text += f"\nTraining started from the adapter {_at(provenance.started_from)}.\n"
    return text


def _samples(facts: CardFacts) -> str:
    if not facts.pictures:
        return ""
    rows = [
        [escaped(picture.prompt), _image(picture.base), _image(picture.trained)] for picture in facts.pictures
    ]
    sample = facts.recipe.sample
    return (
        "## Samples\n\n"
        + table(["prompt", "base", f"with the adapter, step {facts.provenance.step}"], rows)
        + f"\nGenerated with the base as it was used in training ({escaped(_storage(facts))}): {sample.steps} steps,"
        f" guidance scale {sample.guidance_scale:g}, {sample.width} x {sample.height} pixels, seeds from {sample.seed}"
        " upward. Both images of a row start from the same noise.\n"
    )


def _image(picture: PushFile | None) -> str:
    return "" if picture is None else f"![]({picture.name})"


def _usage(usage: Usage, facts: CardFacts) -> str:
    needed = "diffusers transformers accelerate peft sentencepiece protobuf" + (
        " bitsandbytes" if usage.has_base or usage.provenance.parts else ""
    )
    text = f"## Use\n\nAfter `pip install {needed}`:\n\n{fenced(usage_sample(usage), 'python')}"
    others = []
    if PEFT_FILE in facts.names:
        others.append(f"PEFT ({escaped(PEFT_FILE)})")
    for folder, reader in (
        ("comfyui", "ComfyUI"),
        ("kohya", "kohya's scripts"),
    ):
        files = [name for name in facts.names if name.startswith(f"{folder}/")]
        if files:
            others.append(f"{reader} ({', '.join(escaped(name) for name in files)})")
    return text + (
        f"\nThe repository also holds the same adapter for {', for '.join(others)}.\n" if others else ""
    )


def _training(facts: CardFacts) -> str:
    recipe = facts.recipe
    train, objective, lora = recipe.train, recipe.objective, recipe.lora
    rows = [
        ("steps", f"{facts.provenance.step} of {train.steps}"),
        ("images per step and process", f"{train.batch_size} x {train.grad_accumulation} micro-batches"),
        ("resolution", _resolution(recipe)),
        ("adapter", f"{_kind(recipe)}, rank {lora.rank}, alpha {lora.alpha:g}, targets {_targets(recipe)}"),
        ("base during training", _storage(facts)),
        ("optimizer", recipe.optimizer.describe()),
        ("learning rate schedule", recipe.lr_schedule.describe()),
        ("timesteps", objective.timesteps.describe()),
        ("shift", objective.shift.describe()),
        ("weighting", objective.weighting.describe()),
        ("loss", objective.loss.describe()),
        ("guidance scale in training", f"{objective.guidance_scale:g}"),
        ("seed", f"{train.seed}"),
    ]
    text = "## Training\n\n" + table(["setting", ""], [[name, escaped(value)] for name, value in rows])
    if facts.provenance.quant != quant_recipe(recipe):
        text += "\nThe base was already quantized, so the settings in section `quant` of the recipe were not used.\n"
    if (change := facts.validation) is not None:
        text += (
            f"\nThe loss on {change.pictures} held-out images changed from {change.base:.4f} to {change.trained:.4f},"
            " measured at fixed noise.\n"
        )
    published = yaml.dump(
        published_settings(recipe), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110
    )
    return (
        f"{text}\n<details><summary>The complete recipe, without local paths</summary>\n\n{fenced(published, 'yaml')}"
        "\n</details>\n"
    )


def _base(facts: CardFacts) -> str:
    base = "the base that the adapter was trained on" if facts.provenance.quant is not None else "the base"
    text = f"## Quantized base\n\n`{BASE}/` holds {base} ({escaped(_storage(facts))}), in the format of bitsandbytes.\n"
    if (error := facts.base_error) is not None:
        measured = (
            f"all {error.weights:,} weights of the {error.layers} quantized layers"
            if error.measured == error.weights
            else f"{error.measured:,} of the {error.weights:,} weights in the {error.layers} quantized layers, in"
            " groups of rows spread over each layer"
        )
        text += (
            f"\nQuantization error: {error.relative:.2%}. This is the RMS difference from the original weights, divided"
            f" by the RMS of the original weights, measured on {measured}.\n"
        )
    return text


def _licence(facts: CardFacts) -> str:
    licence = facts.provenance.licence
    if licence is None:
        return ""
    name = escaped(licence.license_name or licence.license)
    link = licence.license_link
    # Inside angle brackets, only angle brackets, backslashes and line ends can end or change a link.
    linked = name if link is None or any(c in link for c in "<>\\ \n\r") else f"[{name}](<{link}>)"
    return f"## License\n\nSame as the base model: {linked}.\n"


def published_settings(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe without local files and folders, and without the settings of the push."""
    published = recipe.dump()
    for section, settings in recipe:
        for field, value in settings:
            if isinstance(value, Path) and HubReference.of(value) is None:
                del published[section][field]
    if is_folder(recipe.model.path):
        del published["model"]["path"]
    for field in ("push_to_hub", "hub_private"):
        del published["output"][field]
    return published


def _kind(recipe: Recipe) -> str:
    return ("rs" if recipe.lora.rslora else "") + ("DoRA" if recipe.lora.dora else "LoRA")


def _targets(recipe: Recipe) -> str:
    targets = recipe.lora.targets
    return targets if isinstance(targets, str) else ", ".join(targets)


def _storage(facts: CardFacts) -> str:
    quant, dtype = facts.provenance.quant, facts.recipe.quant.compute_dtype
    return dtype if quant is None else f"{quant.describe()}, computed in {dtype}"


def read_validation_summary(run: RunFolder, step: int) -> ValidationSummary | None:
    """Reads the validation losses from the summary of a run.

    Returns None if the run did not finish at `step` or has no held-out images.

    Raises:
        RecipeError: The run's summary.json cannot be read.
    """
    file = run.root / "summary.json"
    try:
        summary: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = summary["validation"]
        if found is None or summary["steps"] != step:
            return None
        return ValidationSummary(int(found["pictures"]), float(found["base"]), float(found["trained"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(f"{file}: cannot be read as the summary of a run: {error}") from error


def front_matter(facts: CardFacts) -> str:
    """Returns the YAML metadata block of the card. Unknown facts are left out."""
    provenance, licence = facts.provenance, facts.provenance.licence
    more: dict[str, Any] = {}
    if provenance.base_model is not None:
        more |= {"base_model_relation": "adapter", "base_model_revision": provenance.revision}
    if prompt := instance_prompt(facts.recipe.data):
        more["instance_prompt"] = prompt
    if facts.pictures:
        more["widget"] = [
            {"text": picture.prompt, "output": {"url": picture.trained.name}} for picture in facts.pictures
        ]
    data = ModelCardData(
        base_model=provenance.base_model,
        library_name="diffusers",
        license=None if licence is None else licence.license,
        license_name=None if licence is None else licence.license_name,
        license_link=None if licence is None else licence.license_link,
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "lora",
            "qlora",
            "halfbyte",
            facts.recipe.model.family,
            "template:sd-lora",
        ],
        **more,
    )
    # Use our own dumper. The library's dumper does not quote line breaks that only YAML treats as line
    # breaks.
    written = yaml.dump(
        data.to_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return f"---\n{written}---\n"
