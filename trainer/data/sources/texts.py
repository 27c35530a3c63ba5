"""Checks the captions of a table that its source does not check itself, without an object for each."""

from pathlib import Path

import numpy
import pyarrow.compute  # type: ignore[import-untyped]

from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.records import place_in
from halfbyte.trainer.data.records.table import Table
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.recipe.data_section import PLACEHOLDER


def check_texts(table: Table, root: Path, style: CaptionStyle, problems: Problems) -> None:
    """Adds a problem for each image without a caption, and for captions that need a trigger word if there is none."""
    first = 0
    for batch in table.batches(0, len(table)):
        captions = batch["captions"]
        if not style.gives_text:
            empty = pyarrow.compute.equal(pyarrow.compute.list_value_length(captions), 0).to_numpy(
                zero_copy_only=False
            )
            for number in numpy.flatnonzero(empty).tolist():
                problems.add(
                    place_in(root, table.row(first + number)).where,
                    f"has an empty caption or none; write one, or set {style.setting}.caption_prefix",
                )
        if not style.trigger_word.strip():
            held = pyarrow.compute.match_substring(captions.flatten(), PLACEHOLDER)
            parents = pyarrow.compute.list_parent_indices(captions).filter(held)
            for number in parents.unique().to_pylist():
                row = table.row(first + number)
                for text in row.captions:
                    style.check_own(place_in(root, row).where, text, problems)
        first += batch.num_rows
