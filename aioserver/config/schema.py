"""How settings are declared, and how the declarations become a voluptuous schema.

A settings class is a `SettingsClass`, and stands for one section of the file. `setting()` declares
a field by its validator, its meaning and its default; `group()` declares a section inside the
section. `section()` turns the class into a validator: a valid mapping becomes an instance of it.

All faults of a mapping are collected and raised together. A value that fails its validator is
replaced by `FAULTY`, so that the rules between the other settings are still checked.

This file is one concept: a declaration means nothing without its validation.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias, TypeVar, dataclass_transform

import voluptuous as vol

from aioserver.config.hints import LITELLM, MAX_SHOWN, OTHER_WORDS, most_like

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

T = TypeVar("T")
# The path of a setting that breaks a rule, from its section, and the message.
BrokenRule: TypeAlias = tuple[tuple[str | int, ...], str]

REQUIRED: Any = dataclasses.MISSING


class _Faulty:
    """Takes the place of a value that failed its validator, and breaks no rule itself.

    Every comparison with it is false, every item is in it, and its attributes, items, calls and
    products are this same object.
    """

    __slots__ = ()

    def _false(self, _other: object) -> bool:
        return False

    def _self(self, *_args: object) -> _Faulty:
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
    """All faults of a section. *partial* is the section made of its valid values, if possible."""

    def __init__(self, errors: list[vol.Invalid], partial: Any = FAULTY) -> None:
        super().__init__(errors)
        self.partial = partial


class WrongShape(vol.Invalid):
    """A value that is not the list, or the section of keys, that was expected.

    *written* shows how to write the list or the section in one line.
    """

    def __init__(self, message: str, written: str) -> None:
        super().__init__(message)
        self.written = written


class Secret:
    """A secret text: `repr` and `str` give `***`, and only `reveal()` gives the text."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the text, to put it into the header of a request and nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclasses.dataclass(frozen=True, slots=True)
class Validator:
    """A validator for voluptuous that can describe the values it accepts.

    *kind* is the type that the documentation shows. *inner* is the settings class of the sections
    inside the value, if there are any. *suffix* follows the key if the value may hold several of
    them: `.<name>` in a mapping, `[]` in a list. *json* is the JSON Schema of the value, which
    accepts at least what *test* does; json_schema.py makes the schema of a section, whose *json*
    is empty.
    """

    kind: str
    test: Callable[[Any], Any]
    inner: type[Any] | None = None
    suffix: str = ""
    json: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        """Return the value to keep. `FAULTY` passes, because its fault is known already.

        Raises:
            vol.Invalid: *value* is refused.
        """
        return FAULTY if value is FAULTY else self.test(value)


def setting(
    validator: Validator,
    meaning: str,
    default: Any = REQUIRED,
    *,
    default_text: str = "",
    secret: bool = False,
) -> Any:
    """Declare one setting. Without *default* the key is required.

    Args:
        validator: checks a value, and returns the value to keep.
        meaning: a phrase for the documentation that can be read without the lines around it.
        default: the value of a missing key. It is None together with *default_text* where
            `__post_init__` derives the value from other settings.
        default_text: the default in words.
        secret: whether every output masks the value.
    """
    metadata = {
        "validator": validator,
        "meaning": meaning,
        "default_text": default_text,
        "secret": secret,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def group(cls: type[Any]) -> Any:
    """Declare a section inside a section.

    It is required if one of its settings is, unless the class has `SHIPPED`.
    """
    validator = section(cls)
    metadata = {"validator": validator, "meaning": "", "secret": False}
    values = shipped_values(cls)
    if values is not None:
        return dataclasses.field(default_factory=lambda: validator(values()), metadata=metadata)
    if any(required(field) for field in fields(cls)):
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=cls, metadata=metadata)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
class SettingsClass:
    """The base that makes a class a frozen dataclass of settings.

    The methods that `dataclass` would write and compile for each class stand here once: there are
    some thirty classes, and one instance of most.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(init=False, repr=False, eq=False)(cls)

    def __init__(self, **values: Any) -> None:
        for field in dataclasses.fields(self):
            if field.name in values:
                value = values.pop(field.name)
            elif callable(factory := field.default_factory):
                value = factory()
            elif (value := field.default) is REQUIRED:
                raise TypeError(f"{type(self).__name__} needs {field.name}")
            object.__setattr__(self, field.name, value)
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")
        self.__post_init__()

    def __post_init__(self) -> None:
        """Derive settings from others, and check the rules between them."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SettingsClass)
            and type(other) is type(self)
            and other._compared() == self._compared()
        )

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        return tuple(
            getattr(self, field.name) for field in dataclasses.fields(self) if field.compare
        )

    def __repr__(self) -> str:
        shown = (field.name for field in dataclasses.fields(self) if field.repr)
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__name__}({values})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"{name} cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"{name} cannot be deleted")


def fields(cls: type[Any] | object) -> list[dataclasses.Field[Any]]:
    """Return the declared settings and sections of a settings class or of an instance, in
    order; its own come before those that it inherits.
    """
    declared = [field for field in dataclasses.fields(cls) if "validator" in field.metadata]  # type: ignore[arg-type]
    base = (cls if isinstance(cls, type) else type(cls)).__base__
    inherited = getattr(base, "__dataclass_fields__", {})
    return sorted(declared, key=lambda field: field.name in inherited)


def key_of(field: dataclasses.Field[Any]) -> str:
    """Return the key of *field* in the file: its name, without the `_` after a Python keyword."""
    return field.name.removesuffix("_")


def required(field: dataclasses.Field[Any]) -> bool:
    """Return whether *field* has no default; only `shipped_defaults` may have one then."""
    return field.default is REQUIRED and field.default_factory is REQUIRED


def shipped_values(cls: type[Any]) -> Callable[[], dict[str, Any]] | None:
    """Return the `SHIPPED` of a settings class: the function that returns a copy of that section
    of the shipped file. These values apply where the section, or a key without a default, is left
    out. None: the class has none.
    """
    values: Callable[[], dict[str, Any]] | None = getattr(cls, "SHIPPED", None)
    return values


def shipped_defaults(cls: type[Any]) -> dict[str, Any]:
    """Return the values of those keys of a settings class whose default is in the shipped file."""
    values = shipped_values(cls)
    if values is None:
        return {}
    shipped = values()
    return {key_of(field): shipped[key_of(field)] for field in fields(cls) if required(field)}


def section(cls: type[T]) -> Validator:
    """Return the validator of a settings class, which turns a valid mapping into an instance.

    Keys in the class's `IGNORED`, which names their replacements, are accepted and dropped. A
    section without a value, such as one whose lines are all comments, counts as an empty mapping.
    The validator raises `Faults`.
    """
    names = {key_of(field): field.name for field in fields(cls)}
    ignored = ignored_keys(cls)

    def test(mapping: Any) -> T:
        if mapping is None:
            mapping = {}
        if not isinstance(mapping, dict):
            message = f"expected a section of keys, not {describe(mapping)}"
            raise WrongShape(message, "{a: …, b: …}")
        mapping = {key: value for key, value in mapping.items() if key not in ignored}
        mapping = shipped_defaults(cls) | mapping
        try:
            values = _schema(cls)(mapping)
        except vol.MultipleInvalid as exc:
            partial, broken = _partial(cls, mapping)
            errors = [_reworded(error, cls) for error in exc.errors]
            raise Faults([*errors, *broken], partial) from None
        return cls(**{names[key]: value for key, value in values.items()})

    return Validator("section", test, cls, json={"section": cls})


def _schema(cls: type[Any]) -> vol.Schema:
    """Return the schema of a settings class. It is not kept: the schemas of all sections take half
    a MB, and a file is read at the start and at a reload.
    """
    return vol.Schema(
        {
            (vol.Required if required(field) else vol.Optional)(key_of(field)): field.metadata[
                "validator"
            ]
            for field in fields(cls)
        }
    )


def ignored_keys(cls: type[Any]) -> Mapping[str, str]:
    """Return the keys of a settings class that are accepted without effect, each with its
    replacement. Files of the system that aioserver replaces have them.
    """
    ignored: Mapping[str, str] = getattr(cls, "IGNORED", {})
    return ignored


def _partial(cls: type[T], mapping: dict[str, Any]) -> tuple[T | Any, list[vol.Invalid]]:
    """Return the instance that a faulty section makes, and the rules that its valid
    values break.
    """
    values = {}
    for field in fields(cls):
        if (key := key_of(field)) in mapping:
            try:
                values[field.name] = field.metadata["validator"](mapping[key])
            except vol.Invalid as exc:
                values[field.name] = getattr(exc, "partial", FAULTY)
        elif required(field):
            values[field.name] = FAULTY
    try:
        return cls(**values), []
    except vol.MultipleInvalid as exc:
        return getattr(exc, "partial", FAULTY), exc.errors


def _reworded(error: vol.Invalid, cls: type[Any]) -> vol.Invalid:
    """Return *error* with voluptuous's message replaced by ours; it is a fault of a *cls*."""
    if error.error_message == "extra keys not allowed":
        key = str(error.path[-1])
        known = [key_of(field) for field in fields(cls)]
        meant = most_like(key[:64].lower(), known, 0.5)
        word = OTHER_WORDS.get(key.lower(), key)
        if key in LITELLM and "llm" in known:
            hint = "a file of LiteLLM: docs/from-litellm.md has its words"
        elif word != key and (place := word if word in known else _path(cls, word)) is not None:
            hint = f"write {place}"
        elif (inner := _inside(cls, key)) is not None:
            hint = f"it belongs in {inner}: indent it further, below that key"
        elif meant is not None:
            hint = f"did you mean {meant}?"
        else:
            hint = f"known: {', '.join(known)}"
        return vol.Invalid(f"unknown key ({hint})", error.path)
    if isinstance(error, vol.RequiredFieldInvalid):
        # The path ends in voluptuous's marker, not in the key.
        return vol.Invalid("required key is missing", [*error.path[:-1], str(error.path[-1])])
    return error


def _path(cls: type[Any], key: str) -> str | None:
    """Return the path of *key* in a section inside *cls*; None: there is none."""
    inner = _inside(cls, key)
    return None if inner is None else f"{inner}.{key}"


def _inside(cls: type[Any], key: str) -> str | None:
    """Return the path of a section inside *cls* which has *key*; None: there is none."""
    for field in fields(cls):
        validator = field.metadata["validator"]
        if validator.inner is None or validator.suffix:
            continue
        if key in {key_of(inner) for inner in fields(validator.inner)}:
            return key_of(field)
        if (deeper := _inside(validator.inner, key)) is not None:
            return f"{key_of(field)}.{deeper}"
    return None


def check_rules(owner: object, *broken: BrokenRule | None) -> None:
    """Finish the `__post_init__` of *owner*; None stands for a rule that holds.

    Raises:
        Faults: at least one rule is broken.
    """
    errors = [vol.Invalid(message, list(path)) for path, message in filter(None, broken)]
    if errors:
        raise Faults(errors, owner)


def changed(owner: T, **values: Any) -> T:
    """Return a copy of *owner*, a section, with *values* instead of its own.

    Its rules are not checked again, as `dataclasses.replace` would: a section that breaks one of
    them has been reported, and is still searched for other faults. `FAULTY` is returned as it is.
    """
    if owner is FAULTY:
        return owner
    made = copy.copy(owner)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def repeated(values: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Yield each of *values* that has occurred before, with its index; `FAULTY` values are never
    equal.
    """
    before: set[T] = set()
    for index, value in enumerate(values):
        if value is not FAULTY and value in before:
            yield index, value
        before.add(value)


def compare(owner: object, path: str, sign: str, limit_path: str) -> BrokenRule | None:
    """Check the rule that one setting of *owner* is `>=` or `<=` another.

    None if the rule holds.
    """
    value, limit = operator.attrgetter(path, limit_path)(owner)
    if not (value < limit if sign == ">=" else value > limit):
        return None
    return (*path.split("."),), f"must be {sign} {limit_path} ({limit}), not {value}"


def refuse(message: str) -> NoReturn:
    """Refuse a value in a validator.

    Raises:
        vol.Invalid: always.
    """
    raise vol.Invalid(message)


def describe(value: object) -> str:
    """Name the type of *value* in the words of a configuration file, without showing the value.

    For a setting that may hold a secret; `show` is for the others.
    """
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


def quoted(name: str, most: int = 64) -> str:
    """Return *name*, which a client has written, in quotes, with *most* characters of it."""
    return json.dumps(name if len(name) <= most else f"{name[:most]}…", ensure_ascii=False)


def show(value: object, most: int = MAX_SHOWN) -> str:
    """Describe the wrong *value* of a setting that holds no secret, and quote it if it has no more
    than *most* characters.

    A longer text may be a misplaced key.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value}"[:MAX_SHOWN]
        case str() if len(value) <= most:
            return f"text {json.dumps(value)}"
        case _:
            return describe(value)
