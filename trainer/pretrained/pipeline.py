"""Locates a pipeline, in a local folder or a Hub snapshot, and computes its fingerprint for the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.quant.files.digest import sha256_of
from halfbyte.quant.files.json_object import read_object
from halfbyte.quant.load.limits import refuse_oversized
from halfbyte.trainer.errors import HubError, RecipeError
from halfbyte.trainer.hub.download import NoSuchRevision, download
from halfbyte.trainer.hub.reference import is_folder, is_repository
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.license import CARD_FILE

# Copies of the same weights in another precision, 9.5 GB of them T5.
_OTHER_PRECISIONS = ["*.fp16*"]

_LIBRARIES = ("diffusers", "transformers")
_CONFIGURATIONS = ("config.json",)  # also matches scheduler_config.json
_ALL = (".json", ".safetensors", ".txt", ".model")
_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class ModelSource:
    """A pipeline folder in diffusers' layout."""

    name: str  # as in the recipe: a repository's name or a folder
    folder: Path
    revision: str | None  # the commit of a Hub snapshot; None for a folder
    asked: str | None = None  # the revision that the recipe asks for

    def config(self, component: str) -> dict[str, Any]:
        """Reads the configuration of a component."""
        return _read_json(self.config_file(component))

    def config_file(self, component: str) -> Path:
        """Returns the path of a component's configuration."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return self.folder / component / name

    def pipeline_index(self) -> dict[str, Any]:
        """Reads model_index.json, which gives the class of each component as [library, name]."""
        return _read_json(self.folder / "model_index.json")

    def require_class(self, denoiser: str) -> dict[str, Any]:
        """Reads model_index.json and checks the class of the transformer.

        Raises:
            RecipeError: There is no model_index.json, or it names another class of transformer.
        """
        index = self.folder / "model_index.json"
        if not index.is_file():
            raise RecipeError(
                f"model.path: {self.name}: no model_index.json in {self.folder}; expected a pipeline folder in"
                f" diffusers' layout (as DiffusionPipeline.save_pretrained writes it){self._suggestion()}"
            )
        listed = _read_json(index)
        found = _entry(listed, "transformer")[1]
        if found not in (None, denoiser):
            raise RecipeError(
                f"model.family: {self.name} has a {found}, but this family trains a {denoiser}; choose the family of"
                " the model"
            )
        return listed

    def require_classes(self, accepted: Mapping[str, str]) -> None:
        """Checks the classes of components against those that will be built, by name.

        A pipeline may name classes of its own, whose code diffusers would load from the repository. No such
        code is run.

        Raises:
            RecipeError: A component is of another class.
        """
        listed = self.pipeline_index()
        for component, class_name in accepted.items():
            library, found = _entry(listed, component)
            # Older pipelines list a tokenizer that is written in Rust with this ending.
            known = found in (class_name, f"{class_name}Fast") and library in _LIBRARIES
            if found is not None and not known:
                raise RecipeError(
                    f"model.path: {self.folder / 'model_index.json'}: {component} is a {library}.{found}, expected"
                    f" {class_name} of diffusers or transformers; code from a model's repository is never run. Name"
                    " the pipeline that the model was made from, or download it again"
                )

    def _suggestion(self) -> str:
        """Returns the settings to use for a folder that is not a pipeline but holds a transformer, a T5 or both."""
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
            f". The folder holds only part of a pipeline: set {' and '.join(sorted(settings, reverse=True))}, and set"
            f" model.path to the complete pipeline that it belongs to{f': {base}' if known else ''}"
        )

    def require(self, components: Sequence[str], denoiser: str, config_alone: Sequence[str] = ()) -> None:
        """Checks the class of the transformer and the files of the components.

        Raises:
            RecipeError: The transformer has another class, or components are missing. The message names all
                of them.
        """
        listed = self.require_class(denoiser)
        self._refuse_without(
            [part for part in components if not self._holds(part, listed, part in config_alone)], components
        )

    def require_listed(self, components: Sequence[str], denoiser: str) -> None:
        """Does the checks of `require` by the pipeline's index only."""
        listed = self.require_class(denoiser)
        self._refuse_without([part for part in components if not _is_listed(part, listed)], components)

    def _refuse_without(self, missing: Sequence[str], components: Sequence[str]) -> None:
        if missing:
            raise RecipeError(
                f"model.path: {self.name}: {', '.join(missing)} missing; a pipeline for training needs"
                f" {', '.join(components)}"
            )

    def fingerprint(self, components: Sequence[str], memo: FileDigests) -> str:
        """Returns a digest of the components' files, which identifies them in cache entries.

        A Hub snapshot is identified by its commit. Files of a local folder are hashed, and `memo` remembers
        their digests, so 10 GB of encoders are read only once.
        """
        if self.revision is not None:
            return sha256_of(f"{self.name}@{self.revision}:{','.join(components)}")
        lines = []
        for component in components:
            for file in sorted(path for path in (self.folder / component).rglob("*") if path.is_file()):
                if file.name.startswith("."):  # a file manager's file, which no loader reads
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
    """Finds the pipeline and downloads the listed components of a Hub repository, with progress bars.

    Args:
        path: A local folder or a Hub repository.
        revision: A branch, tag or commit of the Hub repository.
        components: The components that the pipeline must have.
        denoiser: The class of transformer that the pipeline must have.
        config_alone: Components of which only the configuration is needed.

    Raises:
        RecipeError: The folder is not such a pipeline.
        HubError: The Hub cannot be reached or denies access.
    """
    source = _find(path, revision, components, config_alone)
    source.require(components, denoiser, config_alone)
    return source


def resolve_configurations(
    path: str, revision: str | None, components: Sequence[str], denoiser: str
) -> ModelSource:
    """Finds the pipeline like `resolve`, but needs only the configuration files of its components, not the weights."""
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
    """Returns the class of a pipeline's transformer according to its index, or None if it has no transformer.

    Raises:
        RecipeError: The folder is not a pipeline.
        HubError: The Hub cannot be reached or denies access.
    """
    source = _find(path, revision, (), ())
    if not (source.folder / "model_index.json").is_file():
        raise RecipeError(f"{path}: no model_index.json; expected a pipeline in diffusers' layout")
    return _entry(source.pipeline_index(), "transformer")[1]


def is_pipeline(name: str, revision: str | None) -> bool:
    """Returns True if the Hub repository is a pipeline, that is, has a model_index.json. Raises HubError."""
    return (_download(name, revision, (), ()).folder / "model_index.json").is_file()


def component_folder(path: Path, component: str) -> Path:
    """Returns the folder of a component in the pipeline at `path`.

    If `path` is the folder of a model, returns `path` itself.

    Raises:
        RecipeError: The folder is neither, or the pipeline has no such component.
    """
    if not path.is_dir():
        raise RecipeError(
            f"{path}: no such folder; expected a pipeline in diffusers' layout, or the folder of a model"
        )
    if (path / "model_index.json").is_file() or (path / component).is_dir():
        if (path / component / "config.json").is_file():
            return path / component
        present = sorted(folder.name for folder in path.iterdir() if (folder / "config.json").is_file())
        raise RecipeError(f"{path}: has no component {component!r}; it has {', '.join(present) or 'none'}")
    if not (path / "config.json").is_file():
        raise RecipeError(
            f"{path}: has neither a model_index.json nor a config.json; expected a pipeline in diffusers' layout, or"
            " the folder of a model"
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
            f"model.path: {path}: no such folder; if it was moved, write its new path into the recipe (for an existing"
            " run, recipe.yaml in the run's folder)"
        )
    return _download(path, revision, components, config_alone)


def _download(
    name: str, revision: str | None, components: Sequence[str], config_alone: Sequence[str]
) -> ModelSource:
    # Download only component folders: FLUX's repository has the transformer a second time, as a 24 GB file at
    # the top.
    wanted = ["model_index.json", "config.json", CARD_FILE]
    for part in components:
        endings = _CONFIGURATIONS if part in config_alone else _ALL
        wanted += [f"{part}/*{ending}" for ending in endings]
    folder = download(name, revision, wanted, _OTHER_PRECISIONS)
    return ModelSource(name, folder, folder.name, revision)


def _is_listed(component: str, listed: dict[str, Any]) -> bool:
    return component in listed and _entry(listed, component)[1] is not None


def _entry(listed: Mapping[str, Any], component: str) -> tuple[str | None, str | None]:
    """Returns library and class of a component in a pipeline's index, (None, None) if it has none."""
    entry = listed.get(component)
    if entry is None:
        return None, None
    if (
        not isinstance(entry, list)
        or len(entry) != 2
        or not all(part is None or isinstance(part, str) for part in entry)
    ):
        raise RecipeError(
            f"model.path: model_index.json: {component} is {entry!r:.80}, expected a library and a class, such as"
            ' ["diffusers", "AutoencoderKL"]; download the pipeline again'
        )
    return entry[0], entry[1]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_object(path)
        refuse_oversized(content, path)
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from error
    return content
