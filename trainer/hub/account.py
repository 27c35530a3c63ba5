"""Who is logged in to the Hub, and whether the token may write where a push is to go."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi

from halfbyte.trainer.errors import HubError
from halfbyte.trainer.hub.failures import hub_errors, tokens_page, with_retries

_WRITE = "repo.write"
_DOING = "push: who is logged in"


def require_writer(repository: str) -> None:
    """Raises HubError where nobody is logged in, or who is may not write to the owner/name by what the Hub says."""
    with hub_errors(_DOING):
        account = with_retries(HfApi().whoami)
    try:
        problem = _problem(account, repository)
    except (AttributeError, KeyError, TypeError) as error:
        raise HubError(f"{_DOING}: the Hub's answer could not be understood") from error
    if problem is not None:
        raise HubError(f"push: {problem}")


def _problem(account: Mapping[str, Any], repository: str) -> str | None:
    owner = repository.partition("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or ()}
    # The Hub tells names apart without regard to case.
    known = {name.lower(): name for name in (account["name"], *roles)}
    if owner.lower() not in known:
        return (
            f"{repository} would belong to {owner}, and the token is {account['name']}'s; expected an owner of"
            f" {', '.join(known.values())} (--repo, output.push_to_hub), or another login: {tokens_page()}"
        )
    if roles.get(known[owner.lower()]) == "read":
        return (
            f"{account['name']} may only read in the organization {owner}; ask there for the right to write"
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return f"the token may only read; make one that may write at {tokens_page()}, and log in with it"
    if token.get("role") == "fineGrained" and not _may_write(token.get("fineGrained") or {}, repository):
        return (
            f"the token has no right to write to repositories of {owner}; give it {_WRITE} at {tokens_page()}"
        )
    return None


def _may_write(rights: Mapping[str, Any], repository: str) -> bool:
    """Whether a fine-grained token covers the repository, or everything of its owner."""
    covered = {repository.lower(), repository.partition("/")[0].lower()}
    return any(
        _WRITE in scope.get("permissions", ()) and scope["entity"].get("name", "").lower() in covered
        for scope in rights.get("scoped") or ()
    )
