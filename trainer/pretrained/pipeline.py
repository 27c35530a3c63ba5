"""Where a pipeline's weights are: a folder, or a snapshot of a Hub repository, with a digest for the cache."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.errors import HubError, RecipeError
from halfbyte.trainer.hub.download import NoSuchRevision, download
from halfbyte.trainer.hub.reference import is_folder, is_repository
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.license import CARD_FILE

# The same weights again, 9.5 GB of T5 among them.
_OTHER_PRECISIONS = ["*.fp16*"]

_CONFIGURATIONS = ("config.json",)  # scheduler_config.json ends so as well
_ALL = (".json", ".safetensors", ".txt", ".model")
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class ModelSource:
    """A pipeline folder in diffusers' layout."""

    name: str  # what the recipe calls it: a repository's name or a folder
    folder: Path
    revision: str | None  # the commit of a Hub snapshot; None for a folder
    asked: str | None = None  # the revision that it was asked for by

    def config(self, component: str) -> dict[str, Any]:
        """The component's configuration, without its weights."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return _read_json(self.folder / component / name)

    def pipeline_index(self) -> dict[str, Any]:
        """model_index.json: the class of each component, as [library, name]."""
        return _read_json(self.folder / "model_index.json")

    def require_class(self, denoiser: str) -> dict[str, Any]:
        """model_index.json. Raises RecipeError where there is none, or one of another class of transformer."""
        index = self.folder / "model_index.json"
        if not index.is_file():
            raise RecipeError(
                f"model.path: {self.name}: no model_index.json in {self.folder}; expected a pipeline folder in"
                f" diffusers' layout (as DiffusionPipeline.save_pretrained writes it){self._instead()}"
            )
        listed = _read_json(index)
        found = (listed.get("transformer") or [None, None])[1]
        if found not in (None, denoiser):
            raise RecipeError(
                f"model.family: {self.name} holds a {found}, this family trains a {denoiser}; choose the family that"
                " fits the model"
            )
        return listed

    def _instead(self) -> str:
        """What to write of a folder that is no pipeline, but holds a transformer, T5 or both."""
        named = self.name if self.asked is None else f"{self.name}@{self.asked}"
        settings, base = [], None
        for folder in (self.folder, *sorted(path for path in self.folder.iterdir() if path.is_dir())):
            if not (folder / "config.json").is_file():
                continue
            config = _read_json(folder / "config.json")
            if str(config.get("_class_name")).endswith("Transformer2DModel"):
                settings.append(f"model.transformer: {named}")
                base = config.get("_name_or_path")
            elif config.get("model_type") == "t5":
                settings.append(f"model.text_encoder: {named}")
        if not settings:
            return ""
        known = isinstance(base, str) and is_repository(base) and base != self.name
        return (
            f". It holds a part of one: write {' and '.join(sorted(settings, reverse=True))}, and as model.path the"
            f" pipeline that it belongs to, which has the rest{f': {base}' if known else ''}"
        )

    def require(self, components: Sequence[str], denoiser: str, config_alone: Sequence[str] = ()) -> None:
        """Raises RecipeError for another class of transformer, or naming every component the folder lacks."""
        listed = self.require_class(denoiser)
        self._refuse_without(
            [part for part in components if not self._holds(part, listed, part in config_alone)], components
        )

    def require_listed(self, components: Sequence[str], denoiser: str) -> None:
        """As `require`, by the pipeline's index alone."""
        listed = self.require_class(denoiser)
        self._refuse_without([part for part in components if not _is_listed(part, listed)], components)

    def _refuse_without(self, missing: Sequence[str], components: Sequence[str]) -> None:
        if missing:
            raise RecipeError(
                f"model.path: {self.name}: lacks {', '.join(missing)}; a pipeline for training needs"
                f" {', '.join(components)}"
            )

    def fingerprint(self, components: Sequence[str], memo: FileDigests) -> str:
        """A digest of the components' files: what of the model a cache entry depends on.

        A Hub snapshot is named by its commit. A folder's files are read whole, those that `memo` does not know,
        so that 10 GB of encoders are read for it once.
        """
        if self.revision is not None:
            return sha256_of(f"{self.name}@{self.revision}:{','.join(components)}")
        lines = []
        for component in components:
            for file in sorted(path for path in (self.folder / component).rglob("*") if path.is_file()):
                if file.name.startswith("."):  # a file manager's, which no loader reads
                    continue
                relative = file.relative_to(self.folder).as_posix()
                lines.append(f"{relative}:{memo.of(file)}\n")
        return sha256_of("".join(lines))

    def _holds(self, component: str, listed: dict[str, Any], config_alone: bool) -> bool:
        folder = self.folder / component
        if not _is_listed(component, listed) or not folder.is_dir():
            return False
        if config_alone:
            return (folder / "config.json").is_file()
        if component.startswith(("tokenizer", "scheduler")):
            return any(folder.iterdir())
        return (
            any(file.suffix in _WEIGHTS for file in folder.iterdir()) and (folder / "config.json").is_file()
        )


def resolve(
    path: str,
    revision: str | None,
    components: Sequence[str],
    denoiser: str,
    config_alone: Sequence[str] = (),
) -> ModelSource:
    """Finds the pipeline; a Hub repository's needed components are downloaded (with the client's progress).

    denoiser: the class of transformer that the pipeline must hold. config_alone: components whose weights are not
    needed.

    Raises RecipeError for a folder that is no such pipeline, HubError when the Hub refuses or is out of reach.
    """
    source = _find(path, revision, components, config_alone)
    source.require(components, denoiser, config_alone)
    return source


def resolve_configurations(
    path: str, revision: str | None, components: Sequence[str], denoiser: str
) -> ModelSource:
    """As `resolve`, for the components' configurations alone: a few small files, and no weights need be there."""
    try:
        source = _find(path, revision, components, components)
    except HubError as error:
        setting = "model.revision" if isinstance(error, NoSuchRevision) else "model.path"
        raise type(error)(f"{setting}: {error}") from error
    if source.revision is None:
        source.require_class(denoiser)
    else:
        source.require_listed(components, denoiser)
    return source


def transformer_class(path: str, revision: str | None) -> str | None:
    """The class of a pipeline's transformer, by its index alone; None where it has no transformer.

    Raises RecipeError for a folder that is no pipeline, HubError when the Hub refuses or is out of reach.
    """
    source = _find(path, revision, (), ())
    if not (source.folder / "model_index.json").is_file():
        raise RecipeError(f"{path}: no model_index.json; expected a pipeline in diffusers' layout")
    entry = source.pipeline_index().get("transformer") or (None, None)
    return None if entry[1] is None else str(entry[1])


def is_pipeline(name: str, revision: str | None) -> bool:
    """Whether the Hub repository is a pipeline, by whether it has an index. Raises HubError."""
    return (_download(name, revision, (), ()).folder / "model_index.json").is_file()


def component_folder(path: Path, component: str) -> Path:
    """The folder of one component of the pipeline at `path`, or `path` itself where it is a model's own folder.

    Raises RecipeError for a folder that is neither.
    """
    if not path.is_dir():
        raise RecipeError(
            f"{path}: no such folder; expected a pipeline in diffusers' layout, or a model's folder"
        )
    if (path / "model_index.json").is_file() or (path / component).is_dir():
        if (path / component / "config.json").is_file():
            return path / component
        held = sorted(folder.name for folder in path.iterdir() if (folder / "config.json").is_file())
        raise RecipeError(f"{path}: has no component {component!r}; it has {', '.join(held) or 'none'}")
    if not (path / "config.json").is_file():
        raise RecipeError(
            f"{path}: holds neither a model_index.json nor a config.json; expected a pipeline in diffusers' layout,"
            " or a model's folder"
        )
    return path


def _find(
    path: str, revision: str | None, components: Sequence[str], config_alone: Sequence[str]
) -> ModelSource:
    folder = Path(path)
    if folder.is_dir():
        return ModelSource(path, folder, None)
    if is_folder(path):
        raise RecipeError(
            f"model.path: {path}: no such folder; where it was moved, write its new place into the recipe (a run's is"
            " recipe.yaml in its own folder)"
        )
    return _download(path, revision, components, config_alone)


def _download(
    name: str, revision: str | None, components: Sequence[str], config_alone: Sequence[str]
) -> ModelSource:
    # Component folders only: FLUX's repository also holds the transformer again as one 24 GB file at its top.
    wanted = ["model_index.json", "config.json", CARD_FILE]
    for part in components:
        endings = _CONFIGURATIONS if part in config_alone else _ALL
        wanted += [f"{part}/*{ending}" for ending in endings]
    folder = download(name, revision, wanted, _OTHER_PRECISIONS)
    return ModelSource(name, folder, folder.name, revision)


def _is_listed(component: str, listed: dict[str, Any]) -> bool:
    entry = listed.get(component)
    return entry is not None and entry[0] is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"model.path: {path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"model.path: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"model.path: {path}: expected a JSON object")
    return content
