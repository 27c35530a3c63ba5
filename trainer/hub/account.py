"""Checks before a push that the Hub login may write to the repository."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi

from halfbyte.trainer.errors import HubError
from halfbyte.trainer.hub.failures import hub_errors, tokens_page, with_retries

_WRITE = "repo.write"
_DOING = "push: checking the login"


def require_writer(repository: str) -> None:
    """Asks the Hub who is logged in and checks that the token may write to `repository` (owner/name).

    Raises:
        HubError: Nobody is logged in, the account or token may not write there, or the Hub's response is
            invalid.
    """
    with hub_errors(_DOING):
        account = with_retries(HfApi().whoami)
    try:
        problem = _problem(account, repository)
    except (AttributeError, KeyError, TypeError) as error:
        raise HubError(f"{_DOING}: the Hub's response has an unexpected format") from error
    if problem is not None:
        raise HubError(f"push: {problem}")


def _problem(account: Mapping[str, Any], repository: str) -> str | None:
    owner = repository.partition("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or ()}
    # The Hub ignores case when it compares names.
    known = {name.lower(): name for name in (account["name"], *roles)}
    if owner.lower() not in known:
        return (
            f"the token of {account['name']} cannot write to {repository}, which belongs to {owner}; set --repo or"
            f" output.push_to_hub to a repository of {', '.join(known.values())}, or log in with a token from"
            f" {tokens_page()} that may write to it"
        )
    if roles.get(known[owner.lower()]) == "read":
        return (
            f"{account['name']} has only the read role in the organization {owner}; ask its administrators for the"
            " write role"
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return (
            f"the token is read-only; create a token with write access at {tokens_page()} and log in with it"
        )
    if token.get("role") == "fineGrained" and not _may_write(token.get("fineGrained") or {}, repository):
        return (
            f"the token has no permission to write to repositories of {owner}; add {_WRITE} to the token at"
            f" {tokens_page()}"
        )
    return None


def _may_write(rights: Mapping[str, Any], repository: str) -> bool:
    """Returns True if a fine-grained token may write to the repository, or to all repositories of its owner."""
    covered = {repository.lower(), repository.partition("/")[0].lower()}
    return any(
        _WRITE in scope.get("permissions", ()) and scope["entity"].get("name", "").lower() in covered
        for scope in rights.get("scoped") or ()
    )
