"""The recipe section `data`: one data set, or a list of several with settings of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from halfbyte.trainer.recipe.fields import (
    DEFAULT_FOLDER,
    DataPath,
    FilePath,
    PictureSide,
    PictureSides,
    Section,
    Text,
)
from halfbyte.trainer.recipe.references import References
from halfbyte.trainer.registry import conflict

Kind = Literal["train", "regularization"]
Crop = Literal["center", "random"]
Sizes = Literal["each", "largest"]
PLACEHOLDER = "[trigger]"
"""Stands for the trigger word in captions, as in other trainers."""


class MaskedLoss(Section):
    """A mask for each image says which parts of it are learned: white is learned, black is not."""

    source: Literal["none", "alpha", "files"] = "none"
    """Where masks come from: none; alpha, the images' own transparency, where opaque is white; or files, a gray image
    such as dog.mask.png next to dog.jpg."""
    folder: FilePath | None = None
    """A folder that holds the mask files instead, under the names of their images: masks/dog.png for data/dog.jpg."""
    outside: float = Field(default=0.0, ge=0, le=1)
    """The weight of the loss where the mask is black, from 0 to 1; where it is white the weight is 1."""
    missing: Literal["error", "whole"] = "error"
    """What to do with an image that has no mask: stop with an error that names it, or learn the whole image."""

    @model_validator(mode="after")
    def _a_folder_holds_files(self) -> Self:
        if self.folder is not None and self.source == "alpha":
            raise conflict("folder", f"got {self.folder}, expected null because source is alpha")
        return self


@dataclass(frozen=True)
class DataSet:
    """One data set with all its settings; see the fields of the same names in `DataSection` and `SetSection`."""

    setting: str  # where the recipe names it: "data" or "data.sets[0]"
    path: Path
    image_column: str | None
    caption_column: str | None
    split: str | None
    config: str | None
    kind: Kind
    repeats: float
    weight: float | None
    loss_weight: float
    resolution: int | tuple[int, ...]
    image_sizes: Sizes
    aspect_buckets: bool
    crop: Crop
    random_crops: int
    flip: bool
    caption_lines: bool
    caption_prefix: str
    caption_suffix: str
    trigger_word: str
    shuffle_tags: bool
    keep_tags: int
    tag_separator: str
    tag_dropout: float
    caption_variants: int | None
    caption_dropout: float
    masked_loss: MaskedLoss
    references: References

    @property
    def varies_tags(self) -> bool:
        """True if captions are split into tags, which are shuffled or dropped."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The training resolutions in pixels, the smallest first."""
        return as_resolutions(self.resolution)


def as_resolutions(resolution: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns the different resolutions of a setting, in pixels, the smallest first."""
    return (resolution,) if isinstance(resolution, int) else tuple(sorted(set(resolution)))


class SetSection(Section):
    """One of several data sets. A setting that is null has the value that the section data has for it."""

    path: DataPath
    """A folder of captioned images or another form, as in data.path."""
    image_column: Text | None = None
    """The column of a table that holds the images; null reads image."""
    caption_column: Text | None = None
    """The column of a table that holds the captions; null reads text or caption."""
    split: Text | None = None
    """The split of a saved or Hub data set that has several; null reads train, or the only one."""
    config: Text | None = None
    """The configuration of a Hub data set whose card lists several; null reads the default."""
    kind: Kind = "train"
    """What the images show: train for what is to be learned; regularization for other things of the same class, which
    keep the model from changing them. Validation images are taken from sets of the kind train only."""
    repeats: float = Field(default=1.0, gt=0, le=100_000)
    """How often each image is trained in one epoch. With 0.5, an epoch takes half of the images, and the next the other
    half."""
    weight: float | None = Field(default=None, gt=0)
    """The set's share of the samples, in proportion to the weights of the other sets, however many images they have.
    Replaces repeats; give a weight to all sets or to none."""
    loss_weight: float = Field(default=1.0, gt=0)
    """A factor for the loss of the set's samples."""
    resolution: PictureSide | PictureSides | None = None
    """The training resolution in pixels, or several."""
    image_sizes: Sizes | None = None
    """The resolutions at which an image is trained: each or largest."""
    aspect_buckets: bool | None = None
    """Train each image at the aspect ratio closest to its own."""
    crop: Crop | None = None
    """The part of an image that is kept: center or random."""
    random_crops: int | None = Field(default=None, ge=1, le=1000)
    """The number of random crops of each image."""
    flip: bool | None = None
    """Also train on horizontally mirrored images."""
    caption_lines: bool | None = None
    """Read each line of a .txt or .caption file as a caption of its own."""
    caption_prefix: str | None = Field(default=None, min_length=0)
    """Text put before every caption."""
    caption_suffix: str | None = Field(default=None, min_length=0)
    """Text put after every caption."""
    trigger_word: str | None = Field(default=None, min_length=0)
    """The word in place of [trigger], put in front of captions that lack it. null has the section's value, but no
    trigger word in a set of the kind regularization."""
    shuffle_tags: bool | None = None
    """Shuffle the tags of captions."""
    keep_tags: int | None = Field(default=None, ge=0, le=1000)
    """The number of first tags that stay in place and are never dropped."""
    tag_separator: str | None = Field(default=None, min_length=1)
    """The text between two tags."""
    tag_dropout: float | None = Field(default=None, ge=0, le=1)
    """The share of tags that are left out of a caption."""
    caption_variants: int | None = Field(default=None, ge=1, le=1000)
    """The number of texts that each image is trained with."""
    caption_dropout: float | None = Field(default=None, ge=0, le=1)
    """The share of samples that are trained with an empty caption."""
    masked_loss: MaskedLoss | None = None
    """Masks that say which parts of the images are learned; {source: none} for none."""
    references: References | None = None
    """Reference images for models for editing; {source: none} for none."""

    @model_validator(mode="after")
    def _repeats_or_weight(self) -> Self:
        if self.weight is not None and self.repeats != 1:
            raise conflict("repeats", f"got {self.repeats:g} and weight {self.weight:g}; keep one of them")
        return self


class DataSection(Section):
    """The training images and their captions: one data set at path, or several in sets."""

    path: DataPath | None = None
    """A folder of images with captions in metadata.jsonl, metadata.csv, or .txt, .caption or .json files of the same
    names; a folder of .parquet or .tar files, one such file, or a pattern such as shards/{000..012}.tar; a folder that
    datasets.save_to_disk has written; or a data set on the Hub, hf://datasets/owner/name[@revision]. In a recipe file a
    relative path starts from that file's folder; on the command line it starts from the current folder. null if sets
    lists the data."""
    image_column: Text | None = None
    """The column of a table (parquet, a saved data set) that holds the images; null reads image."""
    caption_column: Text | None = None
    """The column of a table that holds the captions; null reads text or caption."""
    split: Text | None = None
    """The split of a saved or Hub data set that has several; null reads train, or the only one."""
    config: Text | None = None
    """The configuration of a Hub data set whose card lists several; null reads the default."""
    sets: tuple[SetSection, ...] = Field(default=(), strict=False)
    """Several data sets in place of path, such as [{path: ./dog, repeats: 10}, {path: ./dogs, kind: regularization}].
    The settings below hold for all sets that do not set their own."""
    resolution: PictureSide | PictureSides = 1024
    """The training resolution in pixels: the side of the square, or with aspect_buckets the side of a square whose area
    no bucket exceeds. 1024 suits the full-size models; lower values take less memory and time per step. With several,
    such as [512, 768, 1024], images are trained at those for which they are large enough, at least at the smallest."""
    image_sizes: Sizes = "each"
    """Which of several resolutions an image is trained at: each for which it is large enough, so that it counts as that
    many images, or only the largest of them."""
    aspect_buckets: bool = True
    """Train each image at the aspect ratio closest to its own, from 1:4 to 4:1, in batches of one size; false crops
    every image to a square."""
    crop: Crop = "center"
    """The part of an image that is kept if its aspect ratio does not match the training size: the center, or random
    parts."""
    random_crops: int = Field(default=1, ge=1, le=1000)
    """The number of random crops of each image that are encoded and cached; must be 1 if crop is center. More crops
    add variety but take that many times the encoding time and disk space."""
    flip: bool = False
    """Also train on horizontally mirrored images. Leave it off if left and right matter, as in text."""
    caption_lines: bool = False
    """Read each line of a .txt or .caption file as a caption of its own; false reads a file as one caption, line breaks
    included."""
    # pydantic validates the text as UTF-8 only if a length is given; shell arguments may hold lone surrogates.
    caption_prefix: str = Field(default="", min_length=0)
    """Text put before every caption, separated by a space, such as `a photo of`. With a prefix, images need no
    caption of their own."""
    caption_suffix: str = Field(default="", min_length=0)
    """Text put after every caption, separated by a space unless it starts with a comma or another mark, such as
    `, film grain`."""
    trigger_word: str = Field(default="", min_length=0)
    """The word that stands for what is learned. It replaces [trigger] in captions, and is put in front of captions that
    do not contain it. With a trigger word, images need no caption of their own. Sets of the kind regularization do not
    inherit it."""
    shuffle_tags: bool = False
    """Shuffle the tags of captions that are lists of tags, such as `dog, park, sunny`. Leave it off for sentences."""
    keep_tags: int = Field(default=0, ge=0, le=1000)
    """The number of first tags of a caption that stay in place and are never dropped."""
    tag_separator: str = Field(default=", ", min_length=1)
    """The text between two tags. Captions are split at it without the spaces around it."""
    tag_dropout: float = Field(default=0.0, ge=0, le=1)
    """The share of tags, from 0 to 1, that are left out of a caption. Kept tags and tags with the trigger word stay."""
    caption_variants: int | None = Field(default=None, ge=1, le=1000)
    """The number of texts that each image is trained with: its captions in turn, each with tags in another order. Each
    text is encoded and cached before training, at 4 MB for FLUX.1-dev. null uses as many as the image has captions, and
    at least 8 with shuffle_tags or tag_dropout."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """The share of samples, from 0 to 1, that are trained with an empty caption. A value such as 0.1 also
    trains the unconditional prediction, which classifier-free guidance (SD3) relies on."""
    masked_loss: MaskedLoss = MaskedLoss()
    """Masks that say which parts of the images are learned, such as {source: alpha}."""
    references: References = References()
    """Reference images for models for editing, such as {source: folders, folders: [./before]}. The model must be of a
    family that takes them."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with images that cannot be read or decoded: stop with an error that names them all, or train without
    them. The start and the end of a run list those that were skipped."""
    cache_dir: FilePath | None = None
    """The folder that keeps latents, text embeddings and the quantized base between runs; null uses
    ~/.cache/halfbyte. Runs may share it."""

    @property
    def cache_folder(self) -> Path:
        """The cache folder with the default applied and ~ expanded."""
        return self.cache_dir or DEFAULT_FOLDER.expanduser()

    @property
    def resolved_sets(self) -> tuple[DataSet, ...]:
        """The data sets with all their settings, in the recipe's order."""
        if self.path is not None:
            return (self._resolved("data", SetSection(path=self.path)),)
        return tuple(self._resolved(f"data.sets[{index}]", given) for index, given in enumerate(self.sets))

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions of all sets in pixels, the smallest first."""
        return tuple(sorted({side for data_set in self.resolved_sets for side in data_set.resolutions}))

    @property
    def largest_resolution(self) -> int:
        """The largest resolution of any set, in pixels."""
        return self.resolutions[-1]

    def _resolved(self, setting: str, given: SetSection) -> DataSet:
        values = dict(given)
        inherited = {
            name: getattr(self, name) for name, value in values.items() if value is None and name != "weight"
        }
        if given.kind == "regularization" and given.trigger_word is None:
            inherited["trigger_word"] = ""  # its images show other things
        return DataSet(setting, **(values | inherited))

    @model_validator(mode="after")
    def _one_way_to_name_the_data(self) -> Self:
        if self.path is None and not self.sets:
            raise conflict(
                "path",
                "missing, expected a path: a folder of images with captions; several folders go into data.sets",
            )
        if self.path is not None and self.sets:
            raise conflict(
                "path", f"got {self.path}, expected null because data.sets lists the data; move it there"
            )
        return self

    @model_validator(mode="after")
    def _sets_fit_together(self) -> Self:
        weighted = [given.weight is not None for given in self.sets]
        if any(weighted) and not all(weighted):
            missing = weighted.index(False)
            raise conflict(
                f"sets.{missing}.weight", "missing, expected a number because other sets have a weight"
            )
        if self.sets and all(given.kind == "regularization" for given in self.sets):
            raise conflict(
                "sets", "all sets are regularization sets, expected at least one of the kind train"
            )
        return self

    @model_validator(mode="after")
    def _crops_differ_only_at_random(self) -> Self:
        self._check_crops("", self.crop, self.random_crops)
        for index, (given, resolved) in enumerate(zip(self.sets, self.resolved_sets, strict=False)):
            field = f"sets.{index}." if given.random_crops is not None or given.crop is not None else ""
            self._check_crops(field, resolved.crop, resolved.random_crops)
        return self

    @model_validator(mode="after")
    def _tag_settings_have_tags(self) -> Self:
        sets = self.resolved_sets
        self._check_tags("", self, any(given.varies_tags for given in sets))
        for index, (given, resolved) in enumerate(zip(self.sets, sets, strict=False)):
            self._check_tags(f"sets.{index}.", given, resolved.varies_tags)
        return self

    @staticmethod
    def _check_tags(section: str, given: "DataSection | SetSection", varies: bool) -> None:
        if given.keep_tags and not varies:
            raise conflict(
                f"{section}keep_tags",
                f"got {given.keep_tags}, expected 0 because shuffle_tags is false and tag_dropout is 0",
            )

    @staticmethod
    def _check_crops(section: str, crop: Crop, random_crops: int) -> None:
        if random_crops > 1 and crop == "center":
            raise conflict(f"{section}random_crops", f"got {random_crops}, expected 1 because crop is center")


def set_uses(sets: Sequence[DataSet], counts: Sequence[int]) -> list[int]:
    """Returns how many samples of each set an epoch has, at least one; counts: the images of each set.

    With repeats, that is repeats * images. With weights, an epoch has as many samples as there are images, shared in
    proportion to the weights.
    """
    total = sum(given.weight or 0 for given in sets)
    shares = [
        given.repeats * count if given.weight is None else sum(counts) * given.weight / total
        for given, count in zip(sets, counts, strict=True)
    ]
    return [max(1, round(share)) for share in shares]


def common_prefix(data: DataSection) -> str:
    """Returns the prefix of all sets of the kind train; empty if they have none, or different ones."""
    prefixes = {
        given.caption_prefix.strip().replace(PLACEHOLDER, given.trigger_word.strip() or PLACEHOLDER)
        for given in data.resolved_sets
        if given.kind == "train"
    }
    return prefixes.pop() if len(prefixes) == 1 else ""


def common_trigger(data: DataSection) -> str:
    """Returns the trigger word of all sets of the kind train; empty if they have none, or different ones."""
    words = {given.trigger_word.strip() for given in data.resolved_sets if given.kind == "train"}
    return words.pop() if len(words) == 1 else ""


def instance_prompt(data: DataSection) -> str:
    """Returns the text that calls what was trained: the trigger word, or else the common prefix."""
    return common_trigger(data) or common_prefix(data)
