"""Names that are answered, and proxies that are believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from aioserver.auth.hosts import MAX_HOPS, Hosts, Proxies
from aioserver.errors import HostNotAllowed
from aioserver.protocol.addresses import loopback

OWN = [
    *("localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:9"),
    *("127.9.9.9:65535", "[::1]", "[::1]:8000", "localhost:"),
]
FOREIGN = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
    *("evil.example#localhost", "localhost@evil.example", "evil.example:80@localhost", ""),
    *(
        "192.168.0.1",
        "0.0.0.0",
        "[::]",
        "[::1",
        "::1]",
        "[::1]x",
        "localhost:80:80",
        "localhost:x",
    ),
    *("localhost evil.example", "xlocalhost", "localhostx", "2130706433", "127.0.0.1/x", "*"),
    *("localhost,evil.example", "[fe80::1]", "localhost..", ":8000", "\ud800", "local\u0130host"),
]


@pytest.mark.parametrize("host", OWN)
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    hosts = Hosts()

    for _ in range(2):  # the second time it is known
        hosts.check(host)
    hosts.check(None)


@pytest.mark.parametrize("host", FOREIGN)
def test_no_other_name_is(host: str) -> None:
    hosts = Hosts()

    for _ in range(2):
        with pytest.raises(HostNotAllowed) as caught:
            hosts.check(host)
        assert caught.value.http_status == 403
        assert "evil" not in caught.value.message


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("chat.example", True),
        ("CHAT.example:9000", True),
        ("chat.example.", True),
        ("other.example:81", True),
        ("other.example:82", False),
        ("other.example", False),
        ("a.chat.example", False),
        ("[2001:db8::1]:80", True),
        ("localhost", True),
    ],
)
def test_further_names_with_any_port_or_with_theirs(host: str, answered: bool) -> None:
    hosts = Hosts(["Chat.example", "other.example:81", "[2001:db8::1]"])

    assert hosts.allows(host.lower()) is answered


def test_memory_of_hosts_is_bounded() -> None:
    hosts = Hosts()
    for port in range(3000):
        hosts.check(f"localhost:{port}")

    with pytest.raises(HostNotAllowed):
        hosts.check("evil.example")


@given(st.text())
def test_any_host_is_an_answer_and_no_exception(host: str) -> None:
    assert Hosts(["a.example"]).allows(host) in {True, False}


@pytest.mark.parametrize(
    ("name", "own"), [("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False)]
)
def test_loopback_names_are_out_of_reach_of_others(name: str, own: bool) -> None:
    assert loopback(name) is own


# Proxies.

TRUSTED = Proxies(["10.0.0.0/8", "::1/128", "192.168.7.7/32"])


def headers(*values: str, proto: str | None = None) -> CIMultiDict[str]:
    lines: CIMultiDict[str] = CIMultiDict()
    for value in values:
        lines.add("x-forwarded-for", value)
    if proto is not None:
        lines.add("X-Forwarded-Proto", proto)
    return lines


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),  # what is left of it anybody wrote
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9, 10.2.2.2"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9,10.2.2.2"], "203.0.113.9"),  # several lines are one
        ("10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
        ("10.0.0.1", ["203.0.113.9, garbage, 10.2.2.2"], "10.2.2.2"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db8::9]:4711"], "2001:db8::9"),
        ("10.0.0.1", ["2001:DB8::9"], "2001:db8::9"),
        ("10.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("::1", ["203.0.113.9"], "203.0.113.9"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),  # on a socket for both families
        ("::ffff:10.0.0.1", [], "::ffff:10.0.0.1"),
        ("::ffff:203.0.113.5", ["1.1.1.1"], "::ffff:203.0.113.5"),
        ("203.0.113.5", ["1.1.1.1"], "203.0.113.5"),  # not a proxy of ours
        ("192.168.7.8", ["1.1.1.1"], "192.168.7.8"),
        (None, ["1.1.1.1"], ""),
        ("no address", ["1.1.1.1"], "no address"),
    ],
)
def test_the_last_hop_that_is_no_proxy_of_ours_is_the_client(
    peer: str | None, forwarded: list[str], address: str
) -> None:
    assert TRUSTED.address(peer, headers(*forwarded)) == address


@pytest.mark.parametrize("peer", [None, "", "/run/proxy.sock", "b'\\x00proxy'"])
def test_a_peer_on_a_unix_socket_is_believed_where_configured(peer: str | None) -> None:
    forwarded = headers("1.1.1.1, 203.0.113.9", proto="https")
    unix, both = Proxies(["unix"]), Proxies(["unix", "203.0.113.9"])

    assert unix.trusted
    assert unix.address(peer, forwarded) == "203.0.113.9"
    assert unix.secure(peer, forwarded)
    assert both.address(peer, forwarded) == "1.1.1.1"
    assert unix.address("10.0.0.1", forwarded) == "10.0.0.1"
    assert not unix.secure("10.0.0.1", forwarded)


def test_without_proxies_nobody_is_believed() -> None:
    assert Proxies().address("10.0.0.1", headers("1.1.1.1")) == "10.0.0.1"
    assert not Proxies().secure("10.0.0.1", headers(proto="https"))


def test_a_chain_without_end_costs_little() -> None:
    endless = headers(", ".join(["10.0.0.2"] * 5000))

    assert TRUSTED.address("10.0.0.1", endless) == "10.0.0.2"
    assert TRUSTED.address("10.0.0.1", headers(*["1.1.1.1"], ",10.1.1.1" * MAX_HOPS)) == "10.1.1.1"


@pytest.mark.parametrize(
    ("peer", "proto", "secure"),
    [
        ("10.0.0.1", "https", True),
        ("::ffff:10.0.0.1", "https", True),
        ("10.0.0.1", "HTTPS", True),
        ("10.0.0.1", "http, https", True),
        ("10.0.0.1", "https, http", False),
        ("10.0.0.1", "http", False),
        ("10.0.0.1", None, False),
        ("203.0.113.5", "https", False),
        (None, "https", False),
    ],
)
def test_only_a_trusted_proxy_says_https(
    peer: str | None, proto: str | None, secure: bool
) -> None:
    assert TRUSTED.secure(peer, headers(proto=proto)) is secure


@given(st.lists(st.text(), max_size=4))
def test_any_chain_is_an_address_and_no_exception(chain: list[str]) -> None:
    assert TRUSTED.address("10.0.0.1", headers(*chain))
