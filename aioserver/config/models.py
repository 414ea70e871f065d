"""The settings of `llm.models`: names of models, each of which leads to a group of providers.

A name stands for one member, `openai` or `openai/gpt-4o`; for a list of members, which are asked
in this order; or for a section, which says how a member is chosen. A member is the name of a
provider, with the model after a slash if it is not the provider's own, or a section. A name that
stands for another name alone is an *alias* of it, and a member of an ordered group may be another
group, whose members stand in its place.

The rules between groups and providers are those of `Llm` (llm.py).
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from aioserver.config.schema import (
    BrokenRule,
    Faults,
    SettingsClass,
    Validator,
    changed,
    check_rules,
    refuse,
    section,
    setting,
    show,
)
from aioserver.config.validators import count, label, line, list_of, one_of, optional, whole

MAX_NAMES = 1_000
MAX_MEMBERS = 64
# The most groups that may be nested, or follow one another.
MAX_DEPTH = 8
ORDERED, LEAST_BUSY, WEIGHTED = "ordered", "least_busy", "weighted"
PREFIX = "prefix"
# Kinds of input and output, as OpenRouter names them.
MODALITIES = ("text", "image", "file", "audio", "video")
# What happens to requests for a model that no provider has.
PASS, REFUSE = "pass", "refuse"


class Member(SettingsClass):
    """One provider of a group, and the model that it is asked for."""

    provider: str = setting(
        label, "name of a provider; with `choose: ordered` also of a group, alone"
    )
    model: str | None = setting(
        optional(line), "model that it is asked for", None, default_text="the provider's `model`"
    )
    weight: int | None = setting(
        optional(whole(1, 100, "1 to 100")),
        "share of the starts; with `choose: weighted` only",
        None,
        default_text="1",
    )
    max_context: int | None = setting(
        optional(count),
        "tokens of prompt that it takes; a prompt that is certainly longer goes to another member; null: not known",
        None,
    )
    input_modalities: tuple[str, ...] = setting(
        list_of(one_of(*MODALITIES)),
        "what a prompt may have, for GET /v1/models alone; empty: not known",
        (),
    )
    output_modalities: tuple[str, ...] = setting(
        list_of(one_of(*MODALITIES)),
        "what an answer may have, for GET /v1/models alone; empty: not known",
        (),
    )

    @property
    def written(self) -> str:
        """The member as one text."""
        return self.provider if self.model is None else f"{self.provider}/{self.model}"


def _member(value: Any) -> Member:
    if not isinstance(value, str):
        made: Member = _member_section(value)
        return made
    provider, slash, model = line(value).partition("/")
    if not provider or (slash and not model):
        refuse(f"expected PROVIDER or PROVIDER/MODEL, not {show(value)}")
    return Member(provider=provider, model=model or None)


_member_section = section(Member)
member = Validator(
    "PROVIDER, PROVIDER/MODEL or section",
    _member,
    Member,
    json={"anyOf": [line.json, _member_section.json]},
)


class Group(SettingsClass):
    """The members that can answer for one name of a model, and how one of them is chosen."""

    members: tuple[Member, ...] = setting(list_of(member), "")
    choose: str = setting(
        one_of(ORDERED, LEAST_BUSY, WEIGHTED),
        "ordered: the first member that can start; least_busy: the one with the smallest share of its places "
        "taken; weighted: by weight",
        ORDERED,
    )
    affinity: str = setting(
        one_of("none", PREFIX),
        "prefix: a conversation goes to the member whose cache has its beginning, and waits a moment for it",
        "none",
    )
    fallbacks: tuple[str, ...] = setting(
        list_of(line),
        "names of providers, or in `models`, that are asked next, in this order, when no member is "
        "left that could answer",
        (),
    )
    # The path of the members in the file, from the name.
    written: tuple[str, ...] | None = field(default=("members",), compare=False, repr=False)

    def __post_init__(self) -> None:
        broken: list[BrokenRule] = []
        members = list(self.members)
        if not self.members:
            broken.append((self.written or (), "a group needs a member"))
        if len(members) > MAX_MEMBERS:
            broken.append((self.written or (), f"has more than {MAX_MEMBERS} members"))
        if self.affinity == PREFIX and self.choose == ORDERED:
            message = "with `choose: ordered` it would undo the order (set choose: least_busy or weighted)"
            broken.append((("affinity",), message))
        if self.choose in {ORDERED, LEAST_BUSY}:
            broken.extend(
                ((*self.path(index), "weight"), "has a meaning with `choose: weighted` only")
                for index, entry in enumerate(members)
                if isinstance(entry.weight, int)
            )
        check_rules(self, *broken)
        if self.choose == WEIGHTED:
            weighted = (changed(entry, weight=entry.weight or 1) for entry in members)
            object.__setattr__(self, "members", tuple(weighted))

    def path(self, index: int) -> tuple[str | int, ...]:
        """Return the path of the member *index* in the file, from the name of the group."""
        return () if self.written is None else (*self.written, index)


def _group(value: Any) -> Group:
    """Accept a member, a list of members, or a section."""
    if isinstance(value, str):
        return Group(members=(_member(value),), written=None)
    if not isinstance(value, list):
        made: Group = _group_section(value)
        return made
    errors = []
    try:
        members = list_of(member)(value)
    except Faults as faults:
        members, errors = faults.partial, faults.errors
    try:
        made = Group(members=members, written=())
    except Faults as faults:
        made, errors = faults.partial, [*errors, *faults.errors]
    if errors:
        raise Faults(errors, made)
    return made


_group_section = section(Group)
group = Validator(
    "member, list of members or section",
    _group,
    Group,
    json={
        "anyOf": [
            line.json,
            {"type": "array", "items": member.json},
            _group_section.json,
        ]
    },
)


def _name(value: Any, all_names: str = "llm.active is asked for what nobody else has") -> str:
    """Accept the name of a model, which may end with `*` for all names that begin so; *all_names*
    is the hint for a name that would match all.
    """
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        refuse("expected a name of 1 to 256 characters")
    stem = value.removesuffix("*")
    if not stem:
        refuse(f"* alone would take every name ({all_names})")
    if not stem.isprintable() or " " in stem or "*" in stem:
        refuse("expected printable characters without a space, and * at the end only")
    return value


name = Validator(
    "name of a model", _name, json={"type": "string", "pattern": r"^[^\s*]{1,256}\*?$"}
)


def _asked(value: Any) -> str:
    return _name(value, "without this list the caller may ask for all")


# A name that a caller may ask for.
asked = Validator(name.kind, _asked, json=name.json)
