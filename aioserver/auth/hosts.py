"""Under which name we are asked, and from where.

A page on the web can have its own name resolve to 127.0.0.1 (DNS rebinding) and then reads a server on
this machine as its own origin: only the `Host` header tells. So a server without keys answers to names
of this machine, and to those that are configured.

`X-Forwarded-For` and `X-Forwarded-Proto` are what anybody may write; they are believed from the proxies
in `auth.trusted_proxies` only, and each proxy only about the hop in front of it: from the right.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import TYPE_CHECKING

from aioserver.errors import HostNotAllowed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from multidict import MultiMapping

UNIX = "unix"  # among trusted proxies: whoever comes by a UNIX socket, which has no address
MAX_HOPS = 16  # of X-Forwarded-For that are looked at
MAX_KNOWN = 256  # Host values that are remembered as allowed
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(?::[0-9]{0,5})?")


class Hosts:
    """The `Host` values that are answered: this machine's, and *allowed* with or without a port."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(host.lower() for host in allowed)
        self._known: set[str] = set()

    def check(self, host: str | None) -> None:
        """Refuse a request under another name; one without any is no browser's.

        Raises:
            HostNotAllowed: said before the handler.
        """
        if host is None or host in self._known:
            return
        if not self.allows(host):
            raise HostNotAllowed(
                "this server does not answer to that Host: see auth.allowed_hosts"
            )
        if len(self._known) < MAX_KNOWN:
            self._known.add(host)

    def allows(self, host: str) -> bool:
        """Whether a request under this name is answered."""
        host = host.lower()
        if host in self._allowed:
            return True
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1]
        return name.removesuffix(".") in self._allowed or loopback(name.strip("[]"))


class Proxies:
    """The proxies whose word is taken on who is behind them."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = frozenset(trusted)
        self._networks = tuple(map(ipaddress.ip_network, self._trusted - {UNIX}))
        self._trusts = functools.lru_cache(maxsize=1024)(self._within)

    def __bool__(self) -> bool:
        return bool(self._trusted)

    def address(self, peer: str | None, headers: MultiMapping[str]) -> str:
        """The address of the client whose connection comes from *peer*."""
        peer = peer or ""
        if not self or not self._trusts(peer):
            return peer
        hops = ",".join(headers.getall("X-Forwarded-For", ())).rsplit(",", MAX_HOPS)
        found = peer
        for hop in reversed(hops[-MAX_HOPS:]):
            address = _address(hop)
            if address is None:
                break  # whatever is further left may be made up as well
            found = address
            if not self._trusts(address):
                break
        return found

    def secure(self, peer: str | None, headers: MultiMapping[str]) -> bool:
        """Whether a trusted proxy says that its client came by https."""
        if not self or not self._trusts(peer or ""):
            return False
        said = ",".join(headers.getall("X-Forwarded-Proto", ()))
        return said.rpartition(",")[2].strip().lower() == "https"

    def _within(self, address: str) -> bool:
        try:
            ip = _plain(address)
        except ValueError:  # of who comes by a UNIX socket: it has a name, or nothing
            return UNIX in self._trusted
        return any(ip in network for network in self._networks)


def loopback(name: str) -> bool:
    """Whether *name* is this machine's own, wherever it is asked: `localhost` or a loopback address."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower().removesuffix(".") == "localhost"


def _address(hop: str) -> str | None:
    """The address in a hop of X-Forwarded-For, which some write with a port; None: there is none."""
    hop = hop.strip()
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(_plain(hop))
    except ValueError:
        return None


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address *text*; an IPv4 one on a socket for both, `::ffff:10.0.0.1`, is itself.

    Raises:
        ValueError: it is none.
    """
    ip = ipaddress.ip_address(text)
    return (isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped) or ip
