"""Files of a repository on the Hub, in the client's cache: fetched patiently, and told where they cannot be."""

from collections.abc import Sequence
from pathlib import Path

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
    """The repository is there, the revision is not."""


def download(name: str, revision: str | None, wanted: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder of a snapshot, named by its commit, that holds the files whose paths fit a pattern of `wanted`.

    What the client's cache holds whole is taken from there where the Hub cannot be reached. A fault that may pass is
    waited for; what is there by then is not fetched again, and no half file is ever seen in the folder.

    Raises HubError.
    """
    prepare_client(bars=True)
    with hub_errors(f"downloading {name}", name, "read"):
        try:
            return Path(
                with_retries(
                    lambda: snapshot_download(
                        name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(ignored)
                    )
                )
            )
        except GatedRepoError as error:
            raise HubError(
                f"{name} is gated: accept its licence at {page(name)}, then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise NoSuchRevision(f"{name} has no revision {revision!r}; see {page(name)}/commits") from error
        except RepositoryNotFoundError as error:
            # Without a login the Hub says 401 of what is not there.
            raise HubError(
                f"no repository {name} on the Hub, or a private one that you may not read (it answered"
                f" {status_of(error)}): log in with `hf auth login` or set HF_TOKEN, with a token of {tokens_page()}; a"
                " local folder starts with ./, ../, ~ or /"
            ) from error
        except LocalEntryNotFoundError as error:
            if not isinstance(error.__cause__, OfflineModeIsEnabled):
                raise
            raise HubError(
                f"{name} is not (wholly) in the local Hub cache, and HF_HUB_OFFLINE is set; unset it, or name a folder"
            ) from error
