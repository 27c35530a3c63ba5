"""Pins the Hub data sets of a run to the commits that it was started on."""

import re
from collections.abc import Iterator

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.hub.listing import card_folder
from halfbyte.trainer.hub.reference import HubData
from halfbyte.trainer.recipe.data_section import DataSection
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.run_folder.pinned_base import Commits, pinned_commits

_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_data_commits(run: RunFolder, data: DataSection) -> Commits:
    """Returns the commits of a recipe's Hub data sets by setting: those of the run's start, else the newest.

    Raises:
        HubError: a data set does not exist.
        RecipeError: the recipe names another commit than the run was started on.
    """
    pinned = pinned_commits(run)
    found = {}
    for setting, named in _named(data):
        commit = pinned.get(setting)
        if commit is not None and named.revision != commit and _COMMIT.fullmatch(named.revision or ""):
            raise RecipeError(
                f"{setting}: got {named}, but {run.root} was started on {named.at(commit)}; set that commit, or no"
                " revision"
            )
        found[setting] = commit or card_folder(named).name
    return found


def data_at_commits(data: DataSection, commits: Commits) -> DataSection:
    """Returns the section with its Hub data sets at `commits`."""
    values = data.model_dump()
    for setting, named in _named(data):
        if (commit := commits.get(setting)) is None:
            continue
        path = str(named.at(commit))
        if setting == "data.path":
            values["path"] = path
        else:
            values["sets"][int(setting[len("data.sets[") : setting.index("]")])]["path"] = path
    return DataSection.model_validate(values)


def _named(data: DataSection) -> Iterator[tuple[str, HubData]]:
    """Yields the settings that name a Hub data set."""
    for given in data.resolved_sets:
        named = HubData.of(given.path)
        if named is not None:
            yield f"{given.setting}.path", named
