"""One of the base's models: the pipeline's own, or one that `model.transformer` or `model.text_encoder` names."""

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
    """Where a model is, in diffusers' or transformers' layout."""

    setting: str  # the recipe's field that names it
    name: str  # a Hub repository, or a path
    path: Path  # its folder; of a transformer also the one file
    weights_file: str  # what its weights are called where one file holds them
    revision: str | None = None  # the commit of the Hub repository
    subfolder: str | None = None  # in that repository

    @property
    def is_own(self) -> bool:
        """Whether it was given apart from the pipeline."""
        return self.setting != PIPELINE

    @property
    def file(self) -> Path | None:
        """The one file that it is; None for a folder."""
        return self.path if self.path.is_file() else None

    def require_weights(self) -> None:
        """Fetches those of a Hub repository that are not here. Raises HubError, and RecipeError where some are missing
        or damaged, by the files' headers."""
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
        """What tells its weights from all others; files whose digests are not remembered are read, Hub's are not."""
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
    """The pipeline's own."""
    return Component(
        PIPELINE, source.name, source.folder / component, weights_file, source.revision, component
    )


def find_component(setting: str, named: Path, component: str, weights_file: str) -> Component:
    """The component that a setting names: of a Hub repository its configuration is fetched, and no weights.

    Raises HubError, and RecipeError where none is there, or one that is quantized in a way that is not read.
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
                f"{named}: no such file or folder; where it was moved, write its new place into the recipe (a run's is"
                " recipe.yaml in its own folder)"
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
        f"{reference.name} at {folder.name[:12]}: holds neither {component}/{CONFIG_FILE} nor {CONFIG_FILE}; expected a"
        f" repository with {component}/, or a model's own. What else it holds is taken from a folder: hf download"
        f" {reference.name} --local-dir FOLDER"
    )
