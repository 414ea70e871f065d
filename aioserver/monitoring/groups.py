"""Groups as they are seen: the state of a member in one word, and whether a group can start
anything.

A group whose members are of one provider says nothing that the provider does not say itself.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from aioserver.providers.breaker import DEAD, WELL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserver.monitoring.state import GroupState, ProviderState, Snapshot

# The states of a member beside those of a provider: it has no key, it refuses its key, and it has
# said 429.
OFF, KEY_REFUSED, COOLING = "off", "key_refused", "cooling"
# The members that start nothing now, with what to say of them.
OUT = {
    OFF: "is off",
    KEY_REFUSED: "refuses our key",
    DEAD: "is dead",
    COOLING: "cools down",
}
# Names in a text; the others are counted.
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
    """Return, by each provider of whose groups another member is well, the names of these groups.

    A provider to which requests come alone that name no model is not among them.
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
    """Return *names* as one phrase, in which the first of many stand."""
    first = list(names)
    if len(first) > MAX_NAMES + 1:
        first = [*first[:MAX_NAMES], f"{len(first) - MAX_NAMES} more"]
    return " and ".join([", ".join(first[:-1]), first[-1]] if len(first) > 1 else first)
