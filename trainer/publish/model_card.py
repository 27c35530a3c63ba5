"""The model card of a run: what it is, what it draws, how it was made and is used. Facts of the run alone.

Prompts and captions are anybody's text: none of it can become markup, and no path of this machine is in a card.
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
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.recipe.yaml12 import RecipeDumper
from halfbyte.trainer.run_folder.folder import RunFolder


@dataclass(frozen=True)
class ValidationSummary:
    """The loss on pictures that were not trained on, before and after."""

    pictures: int
    base: float
    trained: float


@dataclass(frozen=True)
class CardFacts:
    """Of one push."""

    repository: str
    recipe: Recipe
    provenance: Provenance
    names: tuple[str, ...]  # of the files beside the card
    pictures: tuple[SamplePicture, ...]
    base_error: BaseError | None
    validation: ValidationSummary | None  # of a finished run


def model_card(facts: CardFacts) -> str:
    """README.md of the repository; the same for the same facts."""
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
        on = "a model that was a folder on the trainer's machine"
    else:
        on = _at(HubPart(base, str(revision)))
    text = f"A {_kind(facts.recipe)} for {on}, trained with halfbyte {escaped(facts.provenance.halfbyte)}.\n"
    text += _given_apart(facts.provenance)
    if prompt := facts.recipe.data.caption_prefix.strip():
        text += f"\nEvery caption began with: {escaped(prompt)}\n"
    return text


def _at(part: HubPart) -> str:
    page = f"https://huggingface.co/{part.repository}"
    return (
        f"[{escaped(part.repository)}]({page}) at revision [`{part.revision}`]({page}/tree/{part.revision})"
    )


def _given_apart(provenance: Provenance) -> str:
    """What came from elsewhere than the base."""
    own = {"transformer": (provenance.own_transformer, "transformer", "as a folder or a file of its own")}
    t5 = next((name for name in provenance.parts if name != "transformer"), "text_encoder")
    own[t5] = (provenance.own_text_encoder, "text encoder T5", "as a folder of its own")
    text = ""
    for name, (is_own, called, how) in own.items():
        if is_own:
            part = provenance.parts.get(name)
            how = how if part is None else f"as that of {_at(part)}"
            text += f"\nThe {called} was given apart from that model, {how}.\n"
    if provenance.started_from is not None:
        text += f"\nTraining started from the adapter {_at(provenance.started_from)}.\n"
    return text


def _samples(facts: CardFacts) -> str:
    if not facts.pictures:
        return ""
    rows = [
        [escaped(picture.prompt), _shown(picture.base), _shown(picture.trained)] for picture in facts.pictures
    ]
    sample = facts.recipe.sample
    return (
        "## Samples\n\n"
        + table(["prompt", "base", f"with the adapter, step {facts.provenance.step}"], rows)
        + f"\nDrawn over the base as it was trained on ({escaped(_storage(facts))}), {sample.steps} steps,"
        f" guidance {sample.guidance_scale:g}, {sample.width} x {sample.height}, seed {sample.seed} and upwards; base"
        " and adapter from the same noise.\n"
    )


def _shown(picture: PushFile | None) -> str:
    return "" if picture is None else f"![]({picture.name})"


def _usage(usage: Usage, facts: CardFacts) -> str:
    needed = "diffusers transformers accelerate peft sentencepiece protobuf" + (
        " bitsandbytes" if usage.has_base or usage.provenance.parts else ""
    )
    text = f"## Use\n\nWith `pip install {needed}`:\n\n{fenced(usage_sample(usage), 'python')}"
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
    return text + (f"\nThe same adapter lies there for {', for '.join(others)}.\n" if others else "")


def _training(facts: CardFacts) -> str:
    recipe = facts.recipe
    train, objective, lora = recipe.train, recipe.objective, recipe.lora
    rows = [
        ("steps", f"{facts.provenance.step} of {train.steps}"),
        ("pictures a step and process", f"{train.batch_size} x {train.grad_accumulation} micro-batches"),
        ("resolution", f"{recipe.data.resolution}" + (" (buckets)" if recipe.data.aspect_buckets else "")),
        ("adapter", f"{_kind(recipe)}, rank {lora.rank}, alpha {lora.alpha:g}, targets {_targets(recipe)}"),
        ("base in training", _storage(facts)),
        ("optimizer", recipe.optimizer.describe()),
        ("learning rate schedule", recipe.lr_schedule.describe()),
        ("timesteps", objective.timesteps.describe()),
        ("shift", objective.shift.describe()),
        ("weighting", objective.weighting.describe()),
        ("loss", objective.loss.describe()),
        ("guidance in training", f"{objective.guidance_scale:g}"),
        ("seed", f"{train.seed}"),
    ]
    text = "## Training\n\n" + table(["setting", ""], [[name, escaped(value)] for name, value in rows])
    if facts.provenance.quant != quant_recipe(recipe):
        text += "\nThe base was quantized already, and the recipe's section `quant` did not apply.\n"
    if (change := facts.validation) is not None:
        text += (
            f"\nThe loss on {change.pictures} pictures that were not trained on went from {change.base:.4f} to"
            f" {change.trained:.4f}, at fixed noise.\n"
        )
    published = yaml.dump(
        published_settings(recipe), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110
    )
    return (
        f"{text}\n<details><summary>The whole recipe, without paths</summary>\n\n{fenced(published, 'yaml')}"
        "\n</details>\n"
    )


def _base(facts: CardFacts) -> str:
    held = "the base that the adapter was trained on" if facts.provenance.quant is not None else "the base"
    text = (
        f"## The quantized base\n\n`{BASE}/` is {held} ({escaped(_storage(facts))}), in bitsandbytes'"
        " format.\n"
    )
    if (error := facts.base_error) is not None:
        how = (
            f"all {error.weights:,} weights"
            if error.measured == error.weights
            else f"{error.measured:,} of the {error.weights:,} weights, in runs of rows from all over each layer"
        )
        text += (
            f"\nQuantization error: {error.relative:.2%} (RMS of the difference to the weights it was made from,"
            f" relative to their RMS; measured on {how} of its {error.layers} quantized layers).\n"
        )
    return text


def _licence(facts: CardFacts) -> str:
    licence = facts.provenance.licence
    if licence is None:
        return ""
    name = escaped(licence.license_name or licence.license)
    link = licence.license_link
    # Between angle brackets only they, and line ends, are read.
    shown = name if link is None or any(c in link for c in "<>\\ \n\r") else f"[{name}](<{link}>)"
    return f"## Licence\n\nThat of the base: {shown}.\n"


def published_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe without anything that names a file or folder of this machine, or where it was pushed."""
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
    """From the summary of a run that finished at the step; None where nothing was held out. Raises RecipeError."""
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
        raise RecipeError(f"{file}: not the summary of a run: {error}") from error


def front_matter(facts: CardFacts) -> str:
    """The YAML block at the top of the card; what is not known is not in it."""
    provenance, licence = facts.provenance, facts.provenance.licence
    more: dict[str, Any] = {}
    if provenance.base_model is not None:
        more |= {"base_model_relation": "adapter", "base_model_revision": provenance.revision}
    if prompt := facts.recipe.data.caption_prefix.strip():
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
    # By our own dumper: the library's does not quote line breaks that only YAML knows.
    written = yaml.dump(
        data.to_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return f"---\n{written}---\n"
