"""How a setting is declared: `setting()` for one line, `section()` for a class of them.

A settings class is a frozen dataclass; each field is one line with its check, its meaning and its
default. From these lines come the voluptuous schema, what `aioserver check` prints, the list of
what is not enforced yet, and the README's table.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

import voluptuous as vol

T = TypeVar("T")
Rule: TypeAlias = tuple[tuple[str | int, ...], str]  # where, and what is wrong there

REQUIRED: Any = dataclasses.MISSING


class _Faulty:
    """Stands for a value that failed its check, so that the rules on the others still run.

    It breaks no rule itself: every comparison with it is false, everything is in it, and whatever
    is asked of it is this same object.
    """

    __slots__ = ()

    def _false(self, _other: object) -> bool:
        return False

    def _self(self, *_given: object) -> _Faulty:
        return self

    __lt__ = __le__ = __gt__ = __ge__ = _false
    __getattr__ = __call__ = __getitem__ = __mul__ = __rmul__ = _self

    def __contains__(self, _item: object) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __repr__(self) -> str:
        return "<faulty>"


FAULTY: Any = _Faulty()


class Faults(vol.MultipleInvalid):
    """All faults of a section; *partial* is what could be made of the rest."""

    def __init__(self, errors: list[vol.Invalid], partial: Any = FAULTY) -> None:
        super().__init__(errors)
        self.partial = partial


class Secret:
    """A key. Neither `repr` nor `str` shows it; `reveal()` does."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself: for the header of a request and for nothing else."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True, slots=True)
class Check:
    """A voluptuous validator that can say what it wants.

    *inner* is the section it makes, with *suffix* where it makes several (`.<name>`, `[]`).
    """

    kind: str
    test: Callable[[Any], Any]
    inner: type[Any] | None = None
    suffix: str = ""

    def __call__(self, value: Any) -> Any:
        """The value to keep. Raises `vol.Invalid`; a value known to be faulty passes."""
        return FAULTY if value is FAULTY else self.test(value)


def setting(
    check: Check,
    meaning: str,
    default: Any = REQUIRED,
    *,
    shown: str = "",
    secret: bool = False,
    later: bool = False,
    neutral: Any = REQUIRED,
) -> Any:
    """Declare one setting; without *default* it is required.

    Args:
        check: what a value must be.
        meaning: for the README's table.
        default: None together with *shown*: `__post_init__` derives it from other settings.
        shown: the default in words.
        secret: masked in every output.
        later: read, but not enforced yet by this version.
        neutral: with *later*, the value that asks for nothing where that is not the default.
    """
    about = {
        "check": check,
        "meaning": meaning,
        "shown": shown,
        "secret": secret,
        "later": later,
        "neutral": default if neutral is REQUIRED else neutral,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=about, repr=not secret)
    return dataclasses.field(default=default, metadata=about, repr=not secret)


def group(cls: type[Any]) -> Any:
    """Declare a section inside a section: required where one of its settings is."""
    check = section(cls)
    about = {"check": check, "meaning": "", "later": False, "secret": False}
    if any(required(field) for field in fields(cls)):
        return dataclasses.field(metadata=about)
    return dataclasses.field(default_factory=cls, metadata=about)


def fields(cls: type[Any] | object) -> list[dataclasses.Field[Any]]:
    """The settings of a settings class, in order; not what is derived."""
    return [field for field in dataclasses.fields(cls) if "check" in field.metadata]  # type: ignore[arg-type]


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether the key must be there."""
    return field.default is REQUIRED and field.default_factory is REQUIRED


def section(cls: type[T], suffix: str = "") -> Check:
    """The voluptuous schema of a settings class; a valid mapping becomes an instance.

    Keys that the class names in `IGNORED` are accepted and dropped. No mapping at all, as when all
    its lines are comments, is an empty one.
    """
    keys: dict[Any, Any] = {
        (vol.Required if required(field) else vol.Optional)(field.name): field.metadata["check"]
        for field in fields(cls)
    }
    ignored: tuple[str, ...] = getattr(cls, "IGNORED", ())
    schema = vol.Schema(keys)

    def test(given: Any) -> T:
        if given is None:
            given = {}
        if not isinstance(given, dict):
            refuse(f"expected a section of keys, not {kind(given)}")
        given = {key: value for key, value in given.items() if key not in ignored}
        try:
            values = schema(given)
        except vol.MultipleInvalid as exc:
            partial, broken = _partial(cls, given)
            errors = [_worded(error, [str(key) for key in keys]) for error in exc.errors]
            raise Faults([*errors, *broken], partial) from None
        return cls(**values)

    return Check("section", test, cls, suffix)


def _partial(cls: type[T], given: dict[str, Any]) -> tuple[T | Any, list[vol.Invalid]]:
    """What can be made of a faulty section, and which of its rules the rest breaks."""
    values = {}
    for field in fields(cls):
        if field.name in given:
            try:
                values[field.name] = field.metadata["check"](given[field.name])
            except vol.Invalid as exc:
                values[field.name] = getattr(exc, "partial", FAULTY)
        elif required(field):
            values[field.name] = FAULTY
    try:
        return cls(**values), []
    except vol.MultipleInvalid as exc:
        return getattr(exc, "partial", FAULTY), exc.errors


def _worded(error: vol.Invalid, known: list[str]) -> vol.Invalid:
    """*error* with voluptuous's own words replaced by ours."""
    if error.error_message == "extra keys not allowed":
        key = str(error.path[-1])
        near = difflib.get_close_matches(key[:64].lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return vol.Invalid(f"unknown key ({hint})", error.path)
    if isinstance(error, vol.RequiredFieldInvalid):  # its path ends in the marker, not the name
        return vol.Invalid("required key is missing", [*error.path[:-1], str(error.path[-1])])
    return error


def rules(owner: object, *broken: Rule | None) -> None:
    """Raise every broken rule at once, for `__post_init__`."""
    errors = [vol.Invalid(why, list(at)) for at, why in filter(None, broken)]
    if errors:
        raise Faults(errors, owner)


def compare(owner: object, at: str, sign: str, other: str) -> Rule | None:
    """The rule that `owner.<at>` is `>=` or `<=` `owner.<other>`; None: it is."""
    value, limit = (operator.attrgetter(path)(owner) for path in (at, other))
    if not (value < limit if sign == ">=" else value > limit):
        return None
    return (*at.split("."),), f"must be {sign} {other} ({limit}), not {value}"


def refuse(why: str) -> NoReturn:
    """Raise the fault of a check."""
    raise vol.Invalid(why)


def kind(value: object) -> str:
    """What *value* is, in the words of a configuration file; never its text."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "a section of keys"


# What the settings look like from outside.


def plain(value: Any) -> Any:
    """*value* as a YAML file could hold it, with `***` for every secret."""
    match value:
        case tuple() | list():
            return [plain(item) for item in value]
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            return {field.name: _shown(field, value) for field in fields(value)}
        case _:
            return value


def _shown(field: dataclasses.Field[Any], owner: Any) -> Any:
    value = plain(getattr(owner, field.name))
    if not field.metadata["secret"] or not value:
        return value
    if isinstance(value, dict):
        return dict.fromkeys(value, "***")
    if field.metadata["check"].kind == "URL":  # the server is no secret, the password is
        return re.sub(r"\?.*", "?***", re.sub(r"://.*@", "://***@", value))
    return "***"


def changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The settings that differ between two of a class, by their names: never what they say."""
    for field in fields(old):
        was, now, name = getattr(old, field.name), getattr(new, field.name), path + field.name
        if was == now:
            continue
        if dataclasses.is_dataclass(was) and dataclasses.is_dataclass(now):
            yield from changes(was, now, f"{name}.")
        elif isinstance(was, Mapping) and field.metadata["check"].inner is not None:
            for key in dict.fromkeys((*was, *now)):
                if key in was and key in now:
                    yield from changes(was[key], now[key], f"{name}.{key}.")
                else:
                    yield f"{name}.{key}"
        else:
            yield name


def not_enforced(owner: Any, path: str = "") -> Iterator[str]:
    """The settings marked *later* that ask for something, each once."""
    for field in fields(owner):
        value, about = getattr(owner, field.name), field.metadata
        if about["later"] and value != about["neutral"]:
            yield path + field.name
        if isinstance(value, Mapping) and about["check"].inner is not None:
            inner = (not_enforced(item, f"{path}{field.name}.*.") for item in value.values())
            yield from dict.fromkeys(key for keys in inner for key in keys)
        elif dataclasses.is_dataclass(value):
            yield from not_enforced(value, f"{path}{field.name}.")


def rows(
    cls: type[Any], path: str = "", later: bool = False
) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of every setting, as the README's table shows them."""
    for field in fields(cls):
        about, check = field.metadata, field.metadata["check"]
        if check.inner is not None:
            inner_later = later or about["later"]
            yield from rows(check.inner, f"{path}{field.name}{check.suffix}.", inner_later)
            continue
        default = about["shown"]
        if not default:
            default = "required" if required(field) else f"`{json.dumps(_default(field))}`"
        note = " (not enforced yet)" if later or about["later"] else ""
        yield f"`{path}{field.name}`", check.kind, default, about["meaning"] + note


def _default(field: dataclasses.Field[Any]) -> Any:
    factory: Any = field.default_factory
    return field.default if factory is REQUIRED else factory()
