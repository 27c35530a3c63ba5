"""The recipe setting `references`: where the reference images of a data set come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from halfbyte.trainer.recipe.fields import FilePath, PictureSide, Section, Texts
from halfbyte.trainer.registry import conflict


class References(Section):
    """Reference images, which a model for editing sees in addition to the caption: what each image is made from."""

    source: Literal["none", "files", "folders", "columns"] = "none"
    """Where they come from: none; files, such as dog.ref0.png and dog.ref1.png next to dog.jpg; folders, which hold
    files with the names of the images; or columns of a .parquet file, metadata.jsonl or metadata.csv."""
    folders: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()
    """The folders of the source folders, one for each reference of an image: before/dog.png for data/dog.jpg."""
    columns: Texts = ()
    """The columns of the source columns, in the order of the references. A cell holds an image, the path of one, or a
    list of these. Empty uses the columns reference, references, ref0, ref1 and so on that exist."""
    missing: Literal["error", "none"] = "error"
    """What to do with an image that has no reference: stop with an error that names it, or train it without."""
    resolution: PictureSide | None = None
    """The resolution of the references in pixels; null uses that of the image."""

    @model_validator(mode="after")
    def _each_source_has_its_places(self) -> Self:
        if self.source == "folders" and not self.folders:
            raise conflict("folders", "got [], expected at least one folder because source is folders")
        if self.folders and self.source != "folders":
            raise conflict(
                "folders", f"got {len(self.folders)} folders, expected [] because source is {self.source}"
            )
        if self.columns and self.source != "columns":
            raise conflict(
                "columns", f"got {list(self.columns)}, expected [] because source is {self.source}"
            )
        if self.resolution is not None and self.source == "none":
            raise conflict("resolution", f"got {self.resolution}, expected null because source is none")
        return self
