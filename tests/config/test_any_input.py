from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aioserver.config import Configuration
from aioserver.config.settings import Settings
from aioserver.config.shipped import SHIPPED
from tests.support.configurations import ANY_MACHINE, ORIGINAL, changed, load, outcome, paths

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


SECRET = "canary-0123456789"


@ANY_MACHINE
@example(path="auth.keys_file", shape="{}")
@given(
    path=st.sampled_from([*paths(Settings)]),
    shape=st.sampled_from(
        [
            *("{}", "'{}", "[{}", "*{}", "!{} x", "{}: {{", "{{a: {}}}", "[{}]", "'${{S}}'"),
            *("${{S}} ${{", "@{}", '"\\q{}"', "|\n{}\n {}", "%{}", "${{S}}", "- {}", "&{} *{}"),
        ]
    ),
)
def test_a_secret_in_any_place_and_shape_is_in_no_fault(
    path: str, shape: str, tmp_path: Path
) -> None:
    *above, last = path.replace("<name>", "mine").replace("[]", "").split(".")
    text, indent = "", ""
    for step in above:
        text += f"{indent}{step}:\n"
        indent += " "
    text += f"{indent}{last}: {shape.format(SECRET, SECRET)}\n"

    assert SECRET not in str(outcome(lambda: load(text, tmp_path / "c.yaml", S=SECRET)))


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@settings(ANY_MACHINE, max_examples=20)
@given(
    prompt=TEXTS,
    port=st.integers(0, 65535),
    ping=st.floats(0.001, 1e6),
    models=st.lists(TEXTS.filter(bool), max_size=3),
    stream=st.booleans(),
)
def test_settings_survive_a_round_trip(
    prompt: str, port: int, ping: float, models: list[str], stream: bool, tmp_path: Path
) -> None:
    data = changed(
        chat__service__system_prompt=prompt.replace("${", ""),
        chat__websocket__port=port,
        chat__websocket__ping_interval=ping,
        chat__service__streaming__enabled=stream,
        llm__providers__groq__models=[model.replace("${", "") or "m" for model in models],
    )

    first = load(yaml.safe_dump(data), tmp_path / "one.yaml")
    two = load(yaml.safe_dump(first.effective()), tmp_path / "two.yaml")

    assert first.settings.chat.websocket.port == port
    assert first.settings == two.settings


@ANY_MACHINE
@given(
    st.binary(max_size=60)
    | st.text(alphabet="chat:lm websocketproviders-[]{}&*!|>'\"%@`#,?\n\t$0123.", max_size=80)
)
def test_any_file_is_settings_or_a_configuration_error(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "c.yaml"

    faults = outcome(lambda: load(text, path))

    assert all(fault.startswith(str(path)) for fault in faults)


@ANY_MACHINE
@given(cut=st.integers(0, 12000), junk=st.text(alphabet=" \n:-[]{}&*'\"$#a1", max_size=4))
def test_a_damaged_file_is_settings_or_a_configuration_error(
    cut: int, junk: str, tmp_path: Path
) -> None:
    text = SHIPPED.read_text()
    path = tmp_path / "c.yaml"

    half = outcome(lambda: load(text[:cut], path))
    patched = outcome(lambda: load(text[:cut] + junk + text[cut + len(junk) :], path))

    assert all(fault.startswith(str(path)) for fault in half + patched)


@settings(ANY_MACHINE, max_examples=30)
@given(
    st.dictionaries(
        st.text(alphabet="CHATLMWEBSOK_", max_size=20), st.text(max_size=10), max_size=3
    )
)
def test_any_environment_is_settings_or_a_configuration_error(extra: Mapping[str, str]) -> None:
    environ = {f"AIOSERVER__{key}": extra[key] for key in extra}

    faults = outcome(lambda: Configuration.load(ORIGINAL, environ=environ))

    assert all(fault.startswith(("AIOSERVER__", str(ORIGINAL))) for fault in faults)


@pytest.mark.parametrize(
    "address", ["http://a]b/v1", "http://[::1/v1", "http://h:x/v1", "http://h:99999/v1"]
)
def test_an_address_that_no_parser_takes_is_a_fault(address: str, tmp_path: Path) -> None:
    provider = f"{{model: m, base_url: '{address}'}}"
    text = f"llm:\n  active: p\n  providers:\n    p: {provider}\n"

    assert "a port from 0 to 65535" in str(outcome(lambda: load(text, tmp_path / "c.yaml")))
