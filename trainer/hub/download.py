"""Downloads files of a Hub repository into the client's cache, with retries and clear errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from halfbyte.trainer.errors import HubError
from halfbyte.trainer.hub.client import prepare_client
from halfbyte.trainer.hub.failures import hub_errors, page, status_of, tokens_page, with_retries


class NoSuchRevision(HubError):
    """The repository exists, but the revision does not."""


def download(
    name: str,
    revision: str | None,
    wanted: Sequence[str],
    ignored: Sequence[str] = (),
    *,
    kind: Literal["model", "dataset"] = "model",
) -> Path:
    """Downloads the files that match a pattern of `wanted` and returns the snapshot's folder.

    The folder is named by its commit. Retries temporary failures without fetching finished files again; the
    folder never holds a partial file. If the Hub cannot be reached, uses the client's cache if it holds all
    of the files.

    Raises:
        NoSuchRevision: The repository has no such revision.
        HubError: The download failed for another reason.
    """
    prepare_client(bars=True)
    with hub_errors(f"downloading {name}", name, "read"):
        try:
            return Path(
                with_retries(
                    lambda: snapshot_download(
                        name,
                        repo_type=kind,
                        revision=revision,
                        allow_patterns=list(wanted),
                        ignore_patterns=list(ignored),
                    )
                )
            )
        except GatedRepoError as error:
            raise HubError(
                f"{name} is gated: accept its license at {page(name, kind)}, then log in with `hf auth login` or set"
                " HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise NoSuchRevision(
                f"{name} has no revision {revision!r}; see {page(name, kind)}/commits"
            ) from error
        except RepositoryNotFoundError as error:
            # Without a login, the Hub responds with 401 for a repository that does not exist.
            missing, hint = f"the Hub has no data set {name}", ""
            if kind == "model":
                missing = f"the Hub has no repository {name}"
                hint = ". The path of a local folder must start with ./, ../, ~ or /"
            raise HubError(
                f"{missing}, or it is private and you may not read it (status {status_of(error)}); log in with"
                f" `hf auth login` or set HF_TOKEN, with a token from {tokens_page()}{hint}"
            ) from error
        except LocalEntryNotFoundError as error:
            if not isinstance(error.__cause__, OfflineModeIsEnabled):
                raise
            raise HubError(
                f"the local Hub cache does not hold all files of {name}, and HF_HUB_OFFLINE is set; unset it, or name a"
                " local folder"
            ) from error
