"""The content of a certificate: its dates, names and issuer, read from DER (RFC 5280, 4.1; ITU-T
X.690).

The standard library shows these only for a peer's certificate that was verified. This reader finds
the fields that operators see, and verifies nothing.
"""

from __future__ import annotations

import binascii
import ipaddress
import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
# Tags (X.690, 8.1.2).
OBJECT, UTC_TIME, LONG_TIME, VERSION, EXTENSIONS = 0x06, 0x17, 0x18, 0xA0, 0xA3
DNS_NAME, ADDRESS = 0x82, 0x87
# The object identifier of subjectAltName.
ALTERNATIVE_NAMES = b"\x55\x1d\x11"
# UTCTime has two digits of the year: from 50 on they belong to the last century.
LAST_CENTURY = 50


class Malformed(ValueError):
    """These bytes are not a certificate."""


class Certificate(msgspec.Struct, frozen=True):
    """A certificate. *begins* and *expires* are seconds since 1970, *names* are hosts and
    addresses for which it is valid, and *subject* and *issuer* are names in DER. *der* is the
    whole certificate.
    """

    der: bytes
    begins: int
    expires: int
    names: tuple[str, ...]
    subject: bytes
    issuer: bytes

    @property
    def self_signed(self) -> bool:
        """Whether it names itself as its issuer."""
        return self.subject == self.issuer


def certificates(pem: bytes) -> list[Certificate]:
    """Return the certificates in *pem*, in order; other blocks are skipped.

    Raises:
        Malformed: a block is not a certificate.
    """
    found = []
    for match in PEM.finditer(pem):
        try:
            der = binascii.a2b_base64(match[1])
        except binascii.Error:
            raise Malformed("not base64") from None
        found.append(certificate(der))
    return found


def certificate(der: bytes) -> Certificate:
    """Return the content of the certificate *der*.

    Raises:
        Malformed: it is not a certificate.
    """
    try:
        return _certificate(der)
    except (IndexError, ValueError, StopIteration) as exc:
        raise Malformed(f"no certificate: {exc}") from None


def _certificate(der: bytes) -> Certificate:
    _, whole = next(_items(der))
    _, signed = next(_items(whole))
    fields = [field for field in _items(signed) if field[0] != VERSION]
    # The serial number and the algorithm stand before them.
    issuer, validity, subject = (content for _, content in fields[2:5])
    begins, expires = (_time(tag, content) for tag, content in _items(validity))
    extensions = next((content for tag, content in fields if tag == EXTENSIONS), b"")
    # Clients read no other name since RFC 9525, 2: the common name does not count.
    names = tuple(_alternative_names(extensions))
    return Certificate(der, begins, expires, names, subject, issuer)


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the content of each value in *data*."""
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            digits = length & 0x7F
            length = int.from_bytes(data[at : at + digits])
            at += digits
        content = data[at : at + length]
        if len(content) < length:
            raise Malformed("it is cut")
        yield tag, content
        at += length


def _time(tag: int, content: bytes) -> int:
    text = content.decode("ascii")
    if tag == UTC_TIME:
        century = "19" if int(text[:2]) >= LAST_CENTURY else "20"
        text = century + text
    elif tag != LONG_TIME:
        raise Malformed("a date was expected")
    moment = datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    return int(moment.timestamp())


def _alternative_names(extensions: bytes) -> Iterator[str]:
    for _, sequence in _items(extensions):
        for _, extension in _items(sequence):
            parts = list(_items(extension))
            if parts[0] != (OBJECT, ALTERNATIVE_NAMES):
                continue
            _, names = next(_items(parts[-1][1]))
            for tag, name in _items(names):
                if tag == DNS_NAME:
                    yield name.decode("ascii", "replace")
                elif tag == ADDRESS:
                    with suppress(ValueError):
                        yield str(ipaddress.ip_address(name))
