"""The metadata of a model card, which the Hub lists and filters models by."""

from typing import Any

import yaml
from huggingface_hub import ModelCardData

from halfbyte.trainer.publish.card_facts import CardFacts
from halfbyte.trainer.recipe.document import RecipeDumper


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
