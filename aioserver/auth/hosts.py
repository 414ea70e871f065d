"""Policies for the headers that name the host of a request and the address of its client.

A page on the web can let its own name resolve to 127.0.0.1 (DNS rebinding). The browser then takes
a server on this machine for the page's own origin, and only the `Host` header shows the
difference. A server without keys therefore answers requests for the names of this machine and for
configured names only.

Any client can write `X-Forwarded-For` and `X-Forwarded-Proto`. They are believed only when a proxy
of `auth.trusted_proxies` sends them, and each proxy is believed only about the peer that connected
to it: the list is read from the right.
"""

from __future__ import annotations

import functools
import ipaddress
from typing import TYPE_CHECKING

from aioserver.errors import HostNotAllowed
from aioserver.protocol import addresses

if TYPE_CHECKING:
    from collections.abc import Iterable

    from multidict import MultiMapping

# Elements of X-Forwarded-For that are read, counted from the right.
MAX_HOPS = 16
# Host values that are cached as allowed.
MAX_KNOWN = 256


class Hosts:
    """The `Host` values for which a server without keys answers.

    These are the loopback names of this machine with any port, and each host in *allowed*: with
    its own port, or with any port if it has none.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(host.lower() for host in allowed)
        # Values that were found to be allowed, MAX_KNOWN at most.
        self.known: set[str] = set()

    def check(self, host: str | None) -> None:
        """Refuse a request whose `Host` is not allowed.

        A request without the header passes: every browser sends one, so no page has caused it.

        Raises:
            HostNotAllowed: *host* is malformed, or is not one of the allowed hosts.
        """
        if host is None or host in self.known:
            return
        if not self.allows(host):
            raise HostNotAllowed(
                "this server does not answer requests for this Host: add it to auth.allowed_hosts"
            )
        if len(self.known) < MAX_KNOWN:
            self.known.add(host)

    def allows(self, host: str) -> bool:
        """Return whether a request with the `Host` *host* is answered."""
        host = host.lower()
        if host in self._allowed:
            return True
        name = addresses.host_name(host)
        if name is None:
            return False
        return name.removesuffix(".") in self._allowed or addresses.loopback(name.strip("[]"))


class Proxies:
    """The proxies that are trusted to name the clients behind them.

    *trusted*: IP networks, and `unix` for every peer that connects by a UNIX socket.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self.trusted = frozenset(trusted)
        self._networks = tuple(map(ipaddress.ip_network, self.trusted - {addresses.UNIX}))
        self._trusts = functools.lru_cache(maxsize=1024)(self._is_trusted)

    def address(self, peer: str | None, headers: MultiMapping[str]) -> str:
        """Return the address of the client whose request arrived from *peer*.

        It is the first address of `X-Forwarded-For`, read from the right, that is not a trusted
        proxy's, and otherwise the leftmost address that can be read. It is "" for an unknown peer.
        """
        peer = peer or ""
        if not self.trusted or not self._trusts(peer):
            return peer
        hops = ",".join(headers.getall("X-Forwarded-For", ())).rsplit(",", MAX_HOPS)
        client = peer
        for hop in reversed(hops[-MAX_HOPS:]):
            address = addresses.forwarded_address(hop)
            if address is None:
                # The addresses further left may be forged as well.
                break
            client = address
            if not self._trusts(address):
                break
        return client

    def secure(self, peer: str | None, headers: MultiMapping[str]) -> bool:
        """Return whether *peer* is a trusted proxy and says that its client used https."""
        if not self.trusted or not self._trusts(peer or ""):
            return False
        schemes = ",".join(headers.getall("X-Forwarded-Proto", ()))
        return schemes.rpartition(",")[2].strip().lower() == "https"

    def _is_trusted(self, peer: str) -> bool:
        try:
            ip = addresses.address(peer)
        except ValueError:
            # The address of a UNIX socket's peer is a path or empty.
            return addresses.UNIX in self.trusted
        return any(ip in network for network in self._networks)
