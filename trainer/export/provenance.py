"""Records the origin of an export: the base with its revision and license, and the base's quantization error."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.digest import sha256_file
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.load.base_error import BaseError, base_error
from halfbyte.quant.load.transformer import read_config
from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE, checksum_of
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.hub.reference import HubPart
from halfbyte.trainer.pretrained.component import Component
from halfbyte.trainer.pretrained.license import Licence, base_licence
from halfbyte.trainer.pretrained.single_file import original_weights
from halfbyte.trainer.runtime.version import halfbyte_version

log = logging.getLogger(__name__)

BASE_ERROR_FILE = "quantization_error.json"
"""Stored next to the quantized base."""


@dataclass(frozen=True)
class Provenance:
    """The origin of an exported adapter."""

    halfbyte: str  # the halfbyte version that exported it
    step: int
    pipeline: str  # diffusers class of the pipeline
    transformer: str  # diffusers class of the transformer
    base_model: str | None  # a Hub repository; None for a local folder, whose path stays private
    revision: str | None  # the base's commit during training
    own_transformer: bool  # the transformer did not come from base_model (model.transformer)
    max_sequence_length: int  # T5 tokens
    licence: Licence | None  # license of the base, according to its model card
    quant: QuantRecipe | None  # quantization of the base during training; None: in the compute dtype
    own_text_encoder: bool = False  # T5 did not come from base_model (model.text_encoder)
    # The components from other Hub repositories, by their names in the pipeline.
    parts: Mapping[str, HubPart] = field(default_factory=dict)
    started_from: HubPart | None = None  # the Hub adapter that training started from (lora.init_from)
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the adapter's files, by path


def write_provenance(
    family: Family, step: int, quant: QuantRecipe | None, started_from: HubPart | None, folder: Path
) -> None:
    """Writes the adapter's provenance into its folder, which holds the adapter in all its formats."""
    source = family.source
    repository = None if source.revision is None else source.name
    own = {"transformer": family.transformer, family.t5_component: family.t5}
    parts = {name: _hub_part(component) for name, component in own.items() if component.is_own}
    provenance = Provenance(
        halfbyte_version(),
        step,
        family.pipeline_class.__name__,
        family.denoiser_class.__name__,
        repository,
        source.revision,
        family.transformer.is_own,
        family.max_sequence_length,
        base_licence(source.folder, repository, source.revision),
        quant,
        family.t5.is_own,
        {name: part for name, part in parts.items() if part is not None},
        started_from,
        {
            file.relative_to(folder).as_posix(): sha256_file(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
    )
    facts = asdict(provenance) | {"quant": None if quant is None else quant.as_json()}
    facts["checksum"] = checksum_of(facts)
    write_file(folder / PROVENANCE_FILE, json.dumps(facts, indent=1) + "\n")


def read_provenance(file: Path) -> Provenance:
    """Reads the provenance of an exported adapter.

    Raises:
        RecipeError: The file does not exist, or an export of this version did not write it.
    """
    facts = _read(file)
    checksum = facts.pop("checksum", None)  # exports of version 0.2 and older have none
    if checksum not in (None, checksum_of(facts)):
        raise RecipeError(f"{file}: damaged or changed, its checksum does not match; export the run again")
    try:
        licence, quant = facts.pop("licence"), facts.pop("quant")
        parts, started_from = facts.pop("parts", {}), facts.pop("started_from", None)
        return Provenance(
            **facts,
            parts={name: HubPart(**part) for name, part in parts.items()},
            started_from=None if started_from is None else HubPart(**started_from),
            licence=None if licence is None else Licence(**licence),
            quant=None if quant is None else QuantRecipe.of_json(quant),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{file}: was not written by an export of this version; export the run again"
        ) from error


def write_base_error(family: Family, denoiser: nn.Module, folder: Path) -> None:
    """Measures the quantization error of the base and writes it into the base's folder.

    Writes nothing if the source was already quantized, because the error is then unknown.
    """
    try:
        error = _base_error(family, denoiser)
    except (OSError, ValueError) as problem:
        log.warning("cannot measure the quantization error of the base: %s", problem)
        return
    if error is None:
        return
    write_file(folder / BASE_ERROR_FILE, json.dumps(asdict(error), indent=1) + "\n")


def _base_error(family: Family, denoiser: nn.Module) -> BaseError | None:
    folder, file = family.transformer.path, family.transformer.file
    if file is not None:
        with original_weights(file, family.original_names()) as (original, finish):
            return base_error(denoiser, original, finish=finish)
    if read_config(folder).get("quantization_config") is not None:
        return None
    with ShardedWeights(folder) as weights:
        return base_error(denoiser, weights)


def read_base_error(folder: Path) -> BaseError | None:
    """Reads the quantization error from the base's folder.

    Returns None if there is no file. Raises RecipeError.
    """
    file = folder / BASE_ERROR_FILE
    if not file.is_file():
        return None
    try:
        return BaseError(**_read(file))
    except TypeError as error:
        raise RecipeError(
            f"{file}: was not written by an export of this version; export the run again"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(facts, dict):
        raise RecipeError(f"{file}: expected a JSON object")
    return facts


def _hub_part(component: Component) -> HubPart | None:
    """Returns the repository and commit of a component, or None for a local one."""
    if component.revision is None:
        return None
    return HubPart(component.name, component.revision, component.subfolder)
