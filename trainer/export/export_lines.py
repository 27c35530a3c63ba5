"""What is told of an export, line by line."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.trainer.export.export import MERGE_REPORT, Exported
from halfbyte.trainer.export.merge import FAINT, Survival, total

_SHOWN = 5  # layers that kept the least


def merge_lines(survivals: Sequence[Survival], folder: Path) -> list[str]:
    """What to tell of a merge."""
    lines = [f"merged: {folder} ({total(survivals):.0%} of the update survived, see {MERGE_REPORT})"]
    faint = sorted((s for s in survivals if s.kept < FAINT), key=lambda survival: survival.kept)
    if faint:
        lines.append(
            f"warning: {len(faint)} of {len(survivals)} layers kept less than {FAINT:.0%} of their update; use the"
            " adapter beside the base instead, which loses nothing. The least:"
        )
        lines += [
            f"  {survival.layer}: {survival.kept:.0%} kept, error {survival.error:.0%} of an update of"
            f" {survival.relative:.2%} of the weight"
            for survival in faint[:_SHOWN]
        ]
    return lines


def exported_lines(exported: Exported) -> list[str]:
    """What to tell of an export."""
    lines = [f"adapter: {exported.adapter.parent} ({', '.join(exported.formats)})"]
    if exported.base is not None:
        lines.append(f"base: {exported.base}")
    if exported.text_encoder is not None:
        lines.append(f"text encoder: {exported.text_encoder}")
    if exported.merged is not None:
        lines += merge_lines(exported.survivals, exported.merged)
    check = exported.check
    if check is None:
        lines.append("not checked: the self-check is off")
        return lines
    lines.append("checked in stock diffusers:")
    lines += [f"  {part}" for part in check.checked]
    lines += [f"warning: {part}" for part in check.unread]
    lines += [f"not checked: {part}" for part in check.left_out]
    lines.append(f"the adapter moves the prediction by {check.moved:.2%}")
    if check.moved == 0:
        lines.append("warning: an adapter that moves nothing has not been trained")
    return lines
