"""Values of addresses, of `Host` and of `X-Forwarded-For`."""

from __future__ import annotations

import pytest

from aioserver.protocol import addresses


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("192.168.7.7", "192.168.7.7/32"),
        ("2001:DB8:0::/32", "2001:db8::/32"),
    ],
)
def test_network_has_one_spelling(text: str, spelling: str) -> None:
    assert addresses.network(text) == spelling


@pytest.mark.parametrize("text", ["", "unix", "10.0.0.0/33", "proxy.example"])
def test_text_that_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not appear to be|netmask"):
        addresses.network(text)


def test_ipv4_mapped_address_is_the_ipv4_address() -> None:
    assert str(addresses.address("::ffff:10.0.0.1")) == "10.0.0.1"
    assert str(addresses.address("::1")) == "::1"


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        (" 203.0.113.9 ", "203.0.113.9"),
        ("203.0.113.9:4711", "203.0.113.9"),
        ("[2001:db8::9]:4711", "2001:db8::9"),
        ("2001:DB8::9", "2001:db8::9"),
        ("unknown", None),
        ("_hidden", None),
        ("", None),
    ],
)
def test_hop_may_have_a_port(hop: str, address: str | None) -> None:
    assert addresses.forwarded_address(hop) == address


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("chat.example", "chat.example"),
        ("chat.example:8000", "chat.example"),
        ("localhost:", "localhost"),
        ("[::1]:8000", "[::1]"),
        ("[::1", None),
        ("user@host", None),
        ("host:x", None),
        ("", None),
    ],
)
def test_host_is_a_name_and_perhaps_a_port(host: str, name: str | None) -> None:
    assert addresses.host_name(host) == name
