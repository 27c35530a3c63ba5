"""Lists the files of a data set on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from halfbyte.trainer.hub.client import prepare_client
from halfbyte.trainer.hub.download import download
from halfbyte.trainer.hub.failures import hub_errors, with_retries
from halfbyte.trainer.hub.reference import HubData

CARD = "README.md"
_ALWAYS = ".gitattributes"  # in every repository, so that the client does not warn of a missing card


def card_folder(data: HubData) -> Path:
    """Downloads the card of a data set; returns the folder of its files, which is named by the commit.

    Raises:
        HubError: see `download`.
    """
    return download(data.name, data.revision, [CARD, _ALWAYS], kind="dataset")


def files_at(data: HubData) -> list[str]:
    """Returns the names of the files at the data set's revision, sorted.

    With HF_HUB_OFFLINE, the names of the files that have been downloaded.

    Raises:
        HubError: the Hub refuses the request.
    """
    prepare_client(bars=False)
    with hub_errors(f"listing {data.name}", data.name, "read"):
        try:
            names = with_retries(
                lambda: HfApi().list_repo_files(data.name, repo_type="dataset", revision=data.revision)
            )
        except OfflineModeIsEnabled:
            folder = card_folder(data)
            names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return sorted(names)
