"""Values of IP addresses, of the `Host` header and of `X-Forwarded-For`. Parsing only, no policy.

`Host` is RFC 9110, section 7.2: a name, or an IPv6 address in brackets, and perhaps a port.
`X-Forwarded-For` has no standard (its successor `Forwarded` is RFC 7239): each proxy appends the
address of the peer that connected to it, and some append that peer's port as well.
"""

from __future__ import annotations

import ipaddress
import re

# Stands for the peer of a UNIX socket, which has no IP address.
UNIX = "unix"

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\\<>\"\s]+)(?::[0-9]{0,5})?")


def network(text: str) -> str:
    """Return *text*, an IP address or network, in its canonical form; host bits are cleared.

    Raises:
        ValueError: *text* is neither.
    """
    return str(ipaddress.ip_network(text, strict=False))


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IP address *text*.

    An IPv4 peer of a socket for both families has an IPv4-mapped address (`::ffff:10.0.0.1`, RFC
    4291, section 2.5.5.2): the IPv4 address inside it is returned.

    Raises:
        ValueError: *text* is not an IP address.
    """
    ip = ipaddress.ip_address(text)
    return (isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped) or ip


def forwarded_address(hop: str) -> str | None:
    """Return the IP address in one element of `X-Forwarded-For`, or None if it holds none."""
    hop = hop.strip()
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(address(hop))
    except ValueError:
        return None


def host_name(host: str) -> str | None:
    """Return the name in a `Host` value, without its port; an IPv6 address keeps its brackets.

    None means that *host* is malformed.
    """
    match = _HOST.fullmatch(host)
    return None if match is None else match[1]


def loopback(name: str) -> bool:
    """Return whether *name* is a loopback address, or `localhost` (RFC 6761, section 6.3).

    No name is resolved: any other name counts as reachable by others.
    """
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower().removesuffix(".") == "localhost"
