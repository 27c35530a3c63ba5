"""Reads the license of a base model from its model card.

A fact that the card does not state stays unknown.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

log = logging.getLogger(__name__)

CARD_FILE = "README.md"
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")


@dataclass(frozen=True)
class Licence:
    """The three license fields in the metadata of a model card."""

    license: str
    license_name: str | None = None
    license_link: str | None = None


def base_licence(folder: Path, repository: str | None, revision: str | None) -> Licence | None:
    """Reads the license from the model card in a pipeline's folder.

    Returns None if there is no card, or no license in it. A relative link becomes a link to that file in
    `repository` at `revision`. Without them, the link is left out.
    """
    facts = _front_matter(folder / CARD_FILE)
    identifier = facts.get("license")
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
        return None
    name, link = facts.get("license_name"), facts.get("license_link")
    return Licence(
        identifier,
        name if isinstance(name, str) else None,
        _absolute(link, repository, revision) if isinstance(link, str) else None,
    )


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    try:
        match = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig"))
        facts = yaml.safe_load(match.group(2)) if match else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        log.warning("%s: cannot read the license: %s", card, error)
        return {}
    return facts if isinstance(facts, dict) else {}


def _absolute(link: str, repository: str | None, revision: str | None) -> str | None:
    if link.startswith(("https://", "http://")):
        return link
    if repository is None or revision is None:
        return None
    return f"https://huggingface.co/{repository}/blob/{revision}/{quote(link.removeprefix('./'))}"
