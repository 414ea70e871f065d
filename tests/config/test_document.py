from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from aioserver.config import document
from aioserver.config.document import Document, scalar
from aioserver.config.schema import FAULTY
from tests.support.configurations import ANY_MACHINE


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parsers of PyYAML: where its C library is missing, the other one serves."""
    monkeypatch.setattr(document, "LOADER", getattr(yaml, request.param))


def read(text: str, **environ: str) -> Any:
    made = Document("f")
    made.read(text, environ)
    assert made.faults == []
    return made.values


def faults(text: str, **environ: str) -> list[str]:
    made = Document("f")
    made.read(text, environ)
    return [str(fault) for fault in sorted(made.faults)]


def test_every_value_has_the_place_of_its_key() -> None:
    made = Document("f")
    made.read("# head\na:\n  b: 1\n  c:\n  - x\n  - {d: 2}\n", {})

    assert made.values == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    assert str(made.place(("a", "b"))) == "f:3:3"
    assert str(made.place(("a", "c", 1))) == "f:6:5"
    assert str(made.place(("a", "c", 1, "d"))) == "f:6:6"


def test_a_missing_key_has_the_place_of_its_section() -> None:
    made = Document("f")
    made.read("a:\n  b: 1\n", {})

    assert str(made.place(("a", "x", "y"))) == "f:1:1"
    assert str(made.place(("a", "b", "y"))) == "f:2:3"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-12", -12),
        ("16_777_216", 16777216),
        ("0x10", 16),
        ("1.10", 1.1),
        ("1.5e+3", 1500.0),
        ("1e3", "1e3"),
        ("1.0e3", "1.0e3"),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("Yes", True),
        ("OFF", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("tRue", "tRue"),
        ("012", "012"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("0x", "0x"),
        ("0x_", "0x_"),
        ("9" * 5000, "9" * 5000),
        ("text", "text"),
    ],
)
def test_a_bare_scalar_is_typed_without_surprise(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_nan_and_infinity_are_numbers_for_the_checks_to_refuse() -> None:
    assert math.isnan(scalar(".nan"))
    assert scalar("-.inf") == -math.inf


def test_keys_are_names_as_they_are_written() -> None:
    assert read("on: 1\n1.10: 2\n~: 3\n") == {"on": 1, "1.10": 2, "~": 3}


@pytest.mark.parametrize("text", ["", "# only\n", "---\n", "~"])
def test_an_empty_text_has_no_value(text: str) -> None:
    assert read(text) is None


def test_quotes_make_text() -> None:
    assert read("a: '1'\nb: \"yes\"\nc: |\n  2\n") == {"a": "1", "b": "yes", "c": "2\n"}


def test_a_whole_reference_is_typed_as_if_it_stood_there() -> None:
    text = "a: ${A}\nb: ${B:-8000}\nc: ${C:-}\nd: '${A}'\n"

    assert read(text, A="1.5") == {"a": 1.5, "b": 8000, "c": None, "d": "1.5"}


def test_a_part_stays_text() -> None:
    assert read("a: ${A}${A}\nb: x${A}\n", A="1") == {"a": "11", "b": "x1"}


def test_an_empty_variable_takes_the_default() -> None:
    assert read("a: ${A:-x}\nb: x${A}\n", A="") == {"a": "x", "b": "x"}


def test_a_doubled_dollar_is_a_plain_one() -> None:
    assert read("a: $${A}\nb: $5 {x} $$\n") == {"a": "${A}", "b": "$5 {x} $$"}


@pytest.mark.parametrize(
    "value", ["{a: 1}", "[1]", "*x", "&x 1", "a: b", "x\ny: 1", "'q'", "!t", "# c", "${A}"]
)
def test_a_variable_never_adds_structure(value: str) -> None:
    assert read("a: ${A}\nb: 1\n", A=value) == {"a": value, "b": 1}


def test_every_unset_variable_is_named_with_its_place() -> None:
    assert faults("a: ${A}\nb: [1, 'x${B}${C}']\n") == [
        "f:1:1 a: A is not set (set it, or write ${A:-default})",
        "f:2:8 b[1]: B is not set (set it, or write ${B:-default})",
        "f:2:8 b[1]: C is not set (set it, or write ${C:-default})",
    ]


@pytest.mark.parametrize("text", ["${", "${1}", "${A", "${A:-${B}}", "${A-x}", "${}"])
def test_a_reference_without_a_name_is_a_fault(text: str) -> None:
    errors = faults(f"a: x {text}", A="1", B="2")

    assert errors[0].startswith("f:1:1 a: ${ without a name")


def test_the_second_of_two_equal_keys_is_the_fault() -> None:
    assert faults("a:\n  b: 1\n  c: 2\n  b: 3\na: 4\n") == [
        "f:4:3 a.b: this key appears twice (first on line 2)",
        "f:5:1 a: this key appears twice (first on line 1)",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: &x 1", "f:1:4 a: anchors are refused (write the value out)"),
        ("a: *canary", "f:1:4 a: aliases are refused (write the value out)"),
        ("a: !canary 1", "f:1:4 a: tags are refused (quotes make it text)"),
        ("a: !!python/object:os.system 1", "f:1:4 a: tags are refused (quotes make it text)"),
        ("[1, 2]: 3", "f:1:1: a key must be a plain name"),
        ("? {a: b}\n: 1", "f:1:3: a key must be a plain name"),
        ("a: 1\n---\nb: 2", "f:2:1: a second document in the file"),
    ],
)
def test_yaml_that_a_configuration_does_not_need_is_refused(text: str, fault: str) -> None:
    assert faults(text) == [fault]


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]

    errors = faults("\n".join(lines))

    assert len(errors) == 9 + 8 * 9
    assert all("are refused" in fault for fault in errors)


@pytest.mark.parametrize("text", ["[" * 20_000, "a: " + "{a: " * 5000, "- " * 20_000 + "x"])
def test_depth_is_bounded(text: str) -> None:
    assert len(faults(text)) == 1


def test_the_number_of_values_is_bounded() -> None:
    errors = faults("a: [" + "1, " * 20_000 + "1]")

    assert len(errors) == 1
    assert "too many values" in errors[0]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1,\nb: ]]", "f:2:"),
        ("a: 'canary", "f:1:"),
        ("a:\n\tb: canary", "f:2:"),
        ("a: canary\n  b: canary: c", "f:2:"),
        ("a: %canary\n- canary", "f:1:4"),
        ("%canary 1\n%canary", "f:"),
        ("a: !canary!x 1", "f:1:4"),
        ("a: @canary", "f:1:4"),
        ("a: b\x01canary", "f:1:5"),
        ("a: b\nc: \x01canary", "f:2:4"),
    ],
)
def test_bad_yaml_has_a_place_and_shows_nothing_of_the_text(text: str, place: str) -> None:
    errors = faults(text)

    assert len(errors) == 1
    assert errors[0].startswith(place)
    assert "canary" not in errors[0]


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("a:\n\tb: 1", "f:2:1", "(a tab: YAML indents with spaces only)"),
        ("a:\n  \tb: 1\n", "f:2:", "(a tab: YAML indents with spaces only)"),
        ("a:\n  b: 1\n    c: 2", "f:3:", "indented as the keys beside it are?"),
        ("a:\n    b: 1\n  c: 2", "f:3:3", "indented as the keys beside it are?"),
        ("a: b: c", "f:1:5", "a text with a colon needs quotes"),
    ],
)
def test_a_broken_layout_says_what_is_probably_wrong(text: str, place: str, hint: str) -> None:
    [fault] = faults(text)

    assert fault.startswith(place)
    assert hint in fault


@ANY_MACHINE
@given(st.text() | st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \n\t$", max_size=40))
@example("!")
@example("? ")
@example("a: !!str")
@example("&a")
@example("*a")
@example("a: ${")
def test_any_text_gives_values_or_faults(text: str) -> None:
    made = Document("f")
    made.read(text, {})

    assert made.values is not FAULTY or made.faults


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@ANY_MACHINE
@given(st.text(alphabet="0123456789.eE+-_xo:~yYnNuUlL ", max_size=6))
@example("0E0")
@example("-.5")
def test_a_text_that_looks_like_a_number_is_read_back_as_text(value: str) -> None:
    assert read(yaml.safe_dump({"a": value})) == {"a": value}


@ANY_MACHINE
@given(PLAIN)
def test_yaml_is_read_back_as_it_was_written(value: object) -> None:
    made = Document("f")
    made.read(yaml.safe_dump(value, default_flow_style=False, width=10**6), None)

    assert made.values == value


def test_a_variable_overrides_and_adds() -> None:
    made = Document("f")
    made.read("a:\n  B: 1\n", {})

    made.override("AIOSERVER__A__B", "2")
    made.override("AIOSERVER__A__C__D", "[x, {y: 1}]")
    made.override("AIOSERVER__E", '"3"')

    assert made.values == {"a": {"B": 2, "c": {"d": ["x", {"y": 1}]}}, "e": "3"}
    assert str(made.place(("a", "B"))) == "AIOSERVER__A__B"
    assert str(made.place(("a", "c", "d", 1, "y"))) == "AIOSERVER__A__C__D"
    assert str(made.place(("a",))) == "f:1:1"


@pytest.mark.parametrize("value", ["*canary", "&x", "a: b", "!t", "sk-#1", "http://h", "${A}"])
def test_an_override_that_looks_like_yaml_is_one_text(value: str) -> None:
    made = Document("f")
    made.read("a: 1", {})

    made.override("AIOSERVER__A", value)

    assert made.values == {"a": value}


@pytest.mark.parametrize(
    "value", ["[canary", "{a: 'canary}", '"canary', "[*canary]", "'a' canary"]
)
def test_a_faulty_override_names_its_variable_and_not_its_value(value: str) -> None:
    made = Document("f")
    made.read("a: 1", {})

    made.override("AIOSERVER__A", value)

    assert len(made.faults) == 1
    assert str(made.faults[0]).startswith("AIOSERVER__A a: ")
    assert "canary" not in str(made.faults[0])


def test_an_override_inside_a_value_is_a_fault() -> None:
    made = Document("f")
    made.read("a: 1", {})

    made.override("AIOSERVER__A__B", "2")

    assert [str(fault) for fault in made.faults] == [
        "AIOSERVER__A__B a: is not a section, so nothing can be set inside it"
    ]


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("rest", ["{c: Qhttp://x/v1Q, d: e}", "Qtext of a keyQ", "- QaQ"])
def test_a_quote_that_the_next_one_closes_is_named_where_it_begins(quote: str, rest: str) -> None:
    text = f"a: Qopen\n\nb: {rest}\nc: 1\n".replace("Q", quote)

    (fault, *_) = faults(text)

    assert fault == "f:1:4: not valid YAML: this quote is closed on line 3 only"
