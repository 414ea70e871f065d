"""Groups in the snapshot: the state of each member in one word, and whether a group can start
requests.

A group whose members are all of one provider has no state of its own: the provider's state says it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from aioserver.providers.breaker import DEAD, WELL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.monitoring.state import GroupState, ProviderState, Snapshot

# The states of a member in addition to those of a breaker: its provider has no key, refuses its
# key, or has answered 429.
OFF, KEY_REFUSED, COOLING = "off", "key_refused", "cooling"
# The states in which a member starts nothing, each with the phrase that describes it.
OUT = {
    OFF: "is off",
    KEY_REFUSED: "refuses our key",
    DEAD: "is dead",
    COOLING: "cools down",
}
# Names that a text lists; it has only the number of the others.
MAX_NAMES = 3


def member_state(provider: ProviderState) -> str:
    """Return the state of a member whose provider is *provider*."""
    if not provider["usable"]:
        return OFF
    if provider["flagged"]:
        return KEY_REFUSED
    if provider["state"] != DEAD and provider["pace"]["cooling"]:
        return COOLING
    return provider["state"]


def several(group: GroupState) -> bool:
    """Return whether *group* has members of several providers."""
    return len({member["provider"] for member in group["members"]}) > 1


def closed(group: GroupState) -> bool:
    """Return whether no member of *group* can start anything now."""
    return all(member["state"] in OUT for member in group["members"])


def covering(snapshot: Snapshot) -> dict[str, list[str]]:
    """Return the names of the groups that still work without a provider, by provider.

    These are groups in which another member is well. The active provider is left out if it is
    asked by itself, as requests without a model then depend on it alone.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, group in snapshot["groups"].items():
        members = group["members"]
        well = {member["provider"] for member in members if member["state"] == WELL}
        for provider in {member["provider"] for member in members}:
            if well - {provider}:
                names[provider].append(name)
    active = snapshot["active_group"]
    return {
        provider: groups
        for provider, groups in names.items()
        if active in groups or not snapshot["providers"][provider]["active"]
    }


def listing(names: Iterable[str]) -> str:
    """Return *names* as one phrase, which shortens a long list: "a, b, c and 5 more"."""
    first = list(names)
    if len(first) > MAX_NAMES + 1:
        first = [*first[:MAX_NAMES], f"{len(first) - MAX_NAMES} more"]
    return " and ".join([", ".join(first[:-1]), first[-1]] if len(first) > 1 else first)
