"""Resolves the source of `halfbyte sample`: a base model and, from a run, a file or the Hub, an adapter."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.digest import sha256_file
from halfbyte.quant.load.transformer import empty_model, stored_quantization
from halfbyte.trainer.adapters.formats import PEFT_CONFIG
from halfbyte.trainer.adapters.read import find_file, read_layers
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, LoraLayer
from halfbyte.trainer.denoiser.settings import DTYPES, quant_recipe
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.t5 import T5Setting
from halfbyte.trainer.hub.reference import HubReference, is_repository
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.pipeline import is_pipeline, transformer_class
from halfbyte.trainer.recipe.fields import DEFAULT_FOLDER
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.adapter_source import download_adapter
from halfbyte.trainer.run_folder.checkpoint_folders import copy_adapter, folders
from halfbyte.trainer.run_folder.folder import RunFolder, written_recipe
from halfbyte.trainer.run_folder.pinned_base import open_base
from halfbyte.trainer.sample.request import SampleRequest
from halfbyte.trainer.sample.sampler import SampleSettings
from halfbyte.trainer.wording import in_prose

_SETTINGS = SampleSettings(steps=28, guidance_scale=3.5, width=1024, height=1024, seed=0)


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter, with the model's names of its layers."""

    name: str
    layers: Mapping[str, LoraLayer]
    sha256: str  # of the adapter's file

    @property
    def is_dora(self) -> bool:
        """True for a DoRA adapter, which also has a learned magnitude for each row."""
        return any(layer.magnitude is not None for layer in self.layers.values())


@dataclass(frozen=True)
class Subject:
    """Everything that determines the images apart from prompts, strengths and noise."""

    name: str
    family: Family
    quant: QuantRecipe | None  # None: not quantized
    dtype: torch.dtype
    text_encoder_quant: T5Setting
    cache_folder: Path
    cache_base: bool
    adapter: Adapter | None
    settings: SampleSettings
    prompts: tuple[str, ...] = ()  # of the run's recipe
    exact: tuple[str, ...] = ()  # layers that compute with full-precision weights
    run: Path | None = None  # the run's folder


def find_subject(request: SampleRequest, device: torch.device) -> Subject:
    """Resolves the request's source. Reads no weights except the adapter's. Raises RecipeError or HubError."""
    request = _at_its_revision(request)
    path = Path(request.source).expanduser()
    if (path / "recipe.yaml").is_file():
        subject = _of_run(request, RunFolder(path))
    else:
        if request.checkpoint is not None:
            raise RecipeError(
                f"--checkpoint: {request.source} is not a run's folder, which contains recipe.yaml; leave it out"
            )
        # If a folder `runs` exists, runs/dog is a path in it rather than a repository.
        is_elsewhere = not path.exists() and not path.parent.is_dir() and is_repository(request.source)
        if is_elsewhere and not is_pipeline(request.source, request.revision):
            subject = _of_repository(request, device)
        elif is_elsewhere or (path / "model_index.json").is_file():
            subject = _of_pipeline(request, device)
        elif path.exists():
            subject = _of_adapter(request, path, device)
        else:
            raise RecipeError(
                f"{request.source}: no such file or folder; expected a run, an adapter or a pipeline, or a Hub"
                " repository as owner/name"
            )
    if request.strengths is not None and subject.adapter is None:
        raise RecipeError(
            f"--strength: {request.source} is a pipeline without an adapter to scale; leave it out"
        )
    if subject.dtype == torch.float16 and device.type == "cpu":
        raise RecipeError("--dtype: float16 needs a CUDA device; use bfloat16 or float32")
    return subject


def _at_its_revision(request: SampleRequest) -> SampleRequest:
    """Splits a source owner/name@revision into source and revision. Raises RecipeError if --revision is given too."""
    path = Path(request.source)
    reference = None if path.exists() else HubReference.of(path)
    if reference is None or reference.revision is None:
        return request
    if request.revision is not None:
        raise RecipeError(
            f"--revision: got {request.revision}, but {request.source} already names one; give only one of them"
        )
    return replace(request, source=reference.name, revision=reference.revision)


def _of_run(request: SampleRequest, run: RunFolder) -> Subject:
    for option, value in (("--model", request.model), ("--revision", request.revision)):
        if value is not None:
            raise RecipeError(f"{option}: {run.root} is a run, whose recipe names the base; leave it out")
    recipe = written_recipe(run)
    cache_folder = recipe.data.cache_folder if request.cache is None else request.cache.expanduser()
    family = open_base(
        run,
        recipe.model,
        FileDigests(cache_folder / "digests"),
        max_sequence_length=request.max_sequence_length,
    )
    name = run.root.resolve().name
    finished = run.adapter / ADAPTER_FILE
    if request.checkpoint is None and finished.is_file() and not folders(run.checkpoints):
        adapter = _read_adapter(name, finished, family, location=finished)
    else:
        with tempfile.TemporaryDirectory() as copies:
            step = copy_adapter(run.checkpoints, request.checkpoint, Path(copies))
            try:
                adapter = _read_adapter(f"{name}, {step}", Path(copies) / ADAPTER_FILE, family)
            except RecipeError as error:
                # The error's own path is that of a temporary copy.
                raise RecipeError(f"{run.checkpoints / step}: {error}") from error
    dtype = DTYPES[request.dtype or recipe.quant.compute_dtype]
    sample = recipe.sample
    return Subject(
        name=name,
        family=family,
        quant=_quant(request, family, dtype, quant_recipe(recipe)),
        dtype=dtype,
        text_encoder_quant=_text_encoder_quant(request, family, recipe),
        cache_folder=cache_folder,
        cache_base=recipe.model.cache_base,
        adapter=adapter,
        settings=SampleSettings(
            sample.steps, sample.guidance_scale, sample.width, sample.height, sample.seed
        ),
        prompts=sample.prompts,
        exact=recipe.quant.exact,
        run=run.root,
    )


def _of_adapter(request: SampleRequest, path: Path, device: torch.device) -> Subject:
    file = find_file(path)
    base, revision = request.model, request.revision
    if base is None:
        base, revision = _stated_base(file, request)
    subject = _of_base(request, base, revision, device)
    return replace(
        subject, name=file.stem, adapter=_read_adapter(file.name, file, subject.family, location=path)
    )


def _of_repository(request: SampleRequest, device: torch.device) -> Subject:
    """Resolves an adapter on the Hub. --revision selects the adapter's revision; PEFT's file gives that of the base."""
    folder = download_adapter(request.source, request.revision)
    subject = _of_adapter(replace(request, revision=None), folder, device)
    assert subject.adapter is not None
    pinned = f"{request.source} at {folder.name}"
    return replace(subject, name=request.source, adapter=replace(subject.adapter, name=pinned))


def _of_pipeline(request: SampleRequest, device: torch.device) -> Subject:
    if request.model is not None:
        raise RecipeError(f"--model: {request.source} is itself a pipeline; leave it out")
    return _of_base(request, request.source, request.revision, device)


def _of_base(request: SampleRequest, base: str, revision: str | None, device: torch.device) -> Subject:
    """Resolves a pipeline without an adapter."""
    base = str(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base
    if not Path(base).is_dir() and not is_repository(base):
        raise RecipeError(
            f"--model: {base}: no such folder, expected an existing folder, or a Hub repository as owner/name"
        )
    if revision is not None and Path(base).is_dir():
        raise RecipeError(f"--revision: {base} is a folder, which has no revisions; leave it out")
    try:
        family = _family(base, revision).open(base, revision, request.max_sequence_length)
    except RecipeError as error:
        # Without a recipe, the names of its settings in the message would only confuse.
        raise RecipeError(str(error).removeprefix("model.path: ").removeprefix("model.family: ")) from error
    dtype = DTYPES[request.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    cache = DEFAULT_FOLDER if request.cache is None else request.cache
    return Subject(
        name=Path(base).resolve().name if Path(base).is_dir() else base,
        family=family,
        quant=_quant(request, family, dtype, QuantRecipe("nf4", compute_dtype=dtype)),
        dtype=dtype,
        text_encoder_quant=_text_encoder_quant(request, family, None),
        cache_folder=cache.expanduser(),
        cache_base=True,
        adapter=None,
        settings=_SETTINGS,
    )


def _family(base: str, revision: str | None) -> type[Family]:
    """Returns the family of a pipeline, by the class of its transformer. Raises RecipeError for other classes."""
    found = transformer_class(base, revision)
    known = {FAMILIES[name].denoiser_class.__name__: FAMILIES[name] for name in FAMILIES.names}
    if found not in known:
        raise RecipeError(f"{base}: its transformer is a {found}, expected {in_prose(known)}")
    return known[found]


def _quant(
    request: SampleRequest, family: Family, dtype: torch.dtype, default: QuantRecipe | None
) -> QuantRecipe | None:
    """Returns the transformer's quantization: as stored, else as requested, else the default; None for none."""
    if family.denoiser_folder is not None:
        stored = _stored(family.denoiser_folder)
        if stored is not None:
            if request.quant is not None and request.quant != stored.quant_type:
                raise RecipeError(
                    f"--quant: got {request.quant}, but the transformer of {family.transformer.name} is stored in"
                    f" {stored.quant_type} and cannot be changed; leave out --quant"
                )
            return replace(stored, compute_dtype=dtype)
    if request.quant == "none":
        return None
    if request.quant is None or (default is not None and request.quant == default.quant_type):
        return None if default is None else replace(default, compute_dtype=dtype)
    return QuantRecipe(request.quant, compute_dtype=dtype, skip=default.skip if default else ())


def _text_encoder_quant(request: SampleRequest, family: Family, recipe: Recipe | None) -> T5Setting:
    asked = cast(T5Setting | None, request.text_encoder_quant)
    stored = _stored(family.t5.path)
    if stored is not None and asked not in (None, "auto", stored.quant_type):
        raise RecipeError(
            f"--text-encoder-quant: got {asked}, but T5 of {family.t5.name} is stored in {stored.quant_type} and cannot"
            " be changed; leave the option out"
        )
    if asked is not None and (stored is None or asked != stored.quant_type):
        return asked
    return "auto" if recipe is None else recipe.model.text_encoder_quant


def _stored(folder: Path) -> QuantRecipe | None:
    """Returns the quantization in which a model's folder stores it; None if it is not quantized."""
    try:
        return stored_quantization(folder)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _stated_base(file: Path, request: SampleRequest) -> tuple[str, str | None]:
    """Returns the base and its revision from the PEFT configuration next to an adapter.

    Raises RecipeError if there is none or it does not name a usable base.
    """
    config = file.with_name(PEFT_CONFIG)
    stated: dict[str, Any] = {}
    if config.is_file():
        try:
            stated = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"{config}: not valid JSON: {error}") from error
    base = stated.get("base_model_name_or_path") if isinstance(stated, dict) else None
    if not isinstance(base, str) or not (is_repository(base) or Path(base).is_dir()):
        raise RecipeError(
            f"--model: missing, because {file} does not name its base; give a folder or a Hub repository"
        )
    revision = None if Path(base).is_dir() else stated.get("revision")
    return base, request.revision or revision


def _read_adapter(name: str, file: Path, family: Family, *, location: Path | None = None) -> Adapter:
    """Reads an adapter that fits the family's model. Raises RecipeError, naming `location`, if it does not."""
    layers = read_layers(file, family.original_names())
    _check_fit(layers, family, location or Path(name))
    return Adapter(name, layers, sha256_file(file))


def _check_fit(layers: Mapping[str, LoraLayer], family: Family, path: Path) -> None:
    """Raises RecipeError unless the model, by its configuration, has the adapter's layers with the same shapes."""
    config = {k: v for k, v in family.denoiser_config.items() if k != "quantization_config"}
    try:
        model = empty_model(family.denoiser_class, config, family.source.folder / "transformer")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in layers if name not in linears]
    if missing:
        raise RecipeError(
            f"{path} is for another base: {family.source.name} has no linear layer {missing[0]} ({len(missing)} of the"
            " adapter's layers are missing)"
        )
    for name, layer in layers.items():
        expected = (linears[name].out_features, linears[name].in_features)
        got = (len(layer.up), layer.down.shape[1])
        if expected != got:
            raise RecipeError(
                f"{path} is for another base: its {name} is {got[0]} x {got[1]}, but {family.source.name} has"
                f" {expected[0]} x {expected[1]}"
            )
