"""Locates one component of the base: the pipeline's own, or one set by model.transformer or model.text_encoder."""

import glob
from dataclasses import dataclass
from pathlib import Path

from halfbyte.quant.files.digest import sha256_of
from halfbyte.quant.files.shards import ShardedWeights, weight_files
from halfbyte.quant.layers.exact import EXACT_FILE
from halfbyte.quant.load.serialize import CONFIG_FILE
from halfbyte.quant.load.transformer import stored_quantization
from halfbyte.trainer.errors import HalfbyteError, RecipeError
from halfbyte.trainer.hub.download import download
from halfbyte.trainer.hub.reference import HubReference
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.pipeline import ModelSource, component_folder

PIPELINE = "model.path"


@dataclass(frozen=True)
class Component:
    """The location of a model in the layout of diffusers or transformers."""

    setting: str  # the recipe's setting that names it
    name: str  # a Hub repository, or a path
    path: Path  # its folder; a transformer may also be a single file
    weights_file: str  # the name of the weights file of an unsharded model
    revision: str | None = None  # the commit of the Hub repository
    subfolder: str | None = None  # the model's folder in that repository

    @property
    def is_own(self) -> bool:
        """True if a separate setting names it, so it is not the pipeline's own."""
        return self.setting != PIPELINE

    @property
    def file(self) -> Path | None:
        """The path of a single-file model; None for a folder."""
        return self.path if self.path.is_file() else None

    def require_weights(self) -> None:
        """Downloads missing weights from the Hub, then checks the headers of all weight files.

        Raises:
            HubError: The download failed.
            RecipeError: Weight files are missing or damaged.
        """
        try:
            if self.revision is not None and self.is_own:
                self._fetch(self.revision)
            if self.file is None:
                with ShardedWeights(self.path, self.weights_file):
                    pass
        except HalfbyteError as error:
            raise type(error)(f"{self.setting}: {error}") from error
        except ValueError as error:
            where = "" if self.revision is None else f"{self.name} at {self.revision[:12]}: "
            raise RecipeError(f"{self.setting}: {where}{error}") from error

    def _fetch(self, commit: str) -> None:
        prefix = "" if self.subfolder is None else f"{self.subfolder}/"
        files = [*weight_files(self.path, self.weights_file), EXACT_FILE]
        download(self.name, commit, [prefix + glob.escape(file) for file in files])

    def fingerprint(self, digests: FileDigests) -> str:
        """Returns a string that identifies the weights.

        A Hub model is identified by its commit. Local files are identified by their digests, and files whose
        digests are not remembered are read.
        """
        if self.revision is not None:
            named = f"{self.name}@{self.revision}:{self.subfolder or ''}"
            return sha256_of(named)
        if self.file is not None:
            return digests.of(self.file)
        with ShardedWeights(self.path, self.weights_file) as weights:
            return ":".join(digests.of(file) for file in weights.files)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} @ {self.revision[:12]}"


def pipelines_component(source: ModelSource, component: str, weights_file: str) -> Component:
    """Returns the pipeline's own component."""
    return Component(
        PIPELINE, source.name, source.folder / component, weights_file, source.revision, component
    )


def find_component(setting: str, named: Path, component: str, weights_file: str) -> Component:
    """Finds the component that a setting names.

    For a Hub repository, downloads its configuration but no weights.

    Raises:
        HubError: The download failed.
        RecipeError: There is no such component, or its quantization is not supported.
    """
    try:
        reference = HubReference.of(named)
        if reference is not None:
            found = _on_hub(setting, reference, component, weights_file)
        elif named.is_dir():
            found = Component(setting, str(named), component_folder(named, component), weights_file)
        elif named.exists():
            return Component(setting, str(named), named, weights_file)
        else:
            raise RecipeError(
                f"{named}: no such file or folder; if it was moved, write its new path into the recipe (for an existing"
                " run, recipe.yaml in the run's folder)"
            )
        stored_quantization(found.path)
    except HalfbyteError as error:
        raise type(error)(f"{setting}: {error}") from error
    except ValueError as error:
        raise RecipeError(f"{setting}: {error}") from error
    return found


def _on_hub(setting: str, reference: HubReference, component: str, weights_file: str) -> Component:
    small = (CONFIG_FILE, f"{weights_file}.index.json")
    wanted = [f"{prefix}{file}" for prefix in (f"{component}/", "") for file in small]
    folder = download(reference.name, reference.revision, wanted)
    for subfolder in (component, None):
        path = folder if subfolder is None else folder / subfolder
        if (path / CONFIG_FILE).is_file():
            return Component(setting, reference.name, path, weights_file, folder.name, subfolder)
    raise RecipeError(
        f"{reference.name} at {folder.name[:12]}: has neither {component}/{CONFIG_FILE} nor {CONFIG_FILE}; expected a"
        f" repository with {component}/, or the repository of a single model. To use other files of the repository,"
        f" download them with `hf download {reference.name} --local-dir FOLDER` and name the local path"
    )
