"""The certificate files that settings name: their loading, and their faults.

A pair is a file with a certificate, its intermediates behind it, and the file of its key, which
may be the same. Each file is read as a whole. Files that change meanwhile are a fault, so that a
pair in use is always one that was written as such. No fault shows a key.
"""

from __future__ import annotations

import os
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.files import x509
from aioserver.files.reading import UnreadableFile, read_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aioserver.files.x509 import Certificate

CERT_FILE, KEY_FILE, CLIENT_CA_FILE = "cert_file", "key_file", "client_ca_file"
# OpenSSL's reasons for a key that belongs to another certificate.
OTHER_KEY = frozenset(("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"))
# Operators are warned so many seconds before the end of a certificate.
SOON = 14 * 86400


class CertificateFault(ValueError):
    """A file of certificates cannot be used. *setting* is the last part of the setting's name."""

    def __init__(self, setting: str, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.setting = setting
        self.message = message


def load_pair(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> list[Certificate]:
    """Let *context* present the certificate in *cert_file*; return it and its intermediates.

    It blocks. *key_file* None: the key is in *cert_file*, too.

    Raises:
        CertificateFault: there is no certificate, no key, the two do not match, the key is
            encrypted, or a file has changed meanwhile. *context* cannot be used then.
    """
    content = read(CERT_FILE, cert_file)
    chain = _certificates(CERT_FILE, cert_file, content)
    holder = CERT_FILE if key_file is None else KEY_FILE
    key = content if key_file is None else read(KEY_FILE, key_file)
    path = key_file or cert_file
    if b"PRIVATE KEY-----" not in key:
        message = "holds no key" if key_file else "holds no key, and there is no key_file"
        raise CertificateFault(holder, path, message)

    def refuse() -> str:
        message = "the key is encrypted: its password cannot be entered at each start"
        raise CertificateFault(holder, path, message)

    try:
        context.load_cert_chain(cert_file, key_file, password=refuse)
    except ssl.SSLError as exc:
        if exc.reason in OTHER_KEY:
            message = "the key does not belong to the certificate"
            raise CertificateFault(holder, path, message) from None
        message = f"cannot be used: {reason_of(exc)}"
        raise CertificateFault(CERT_FILE, cert_file, message) from None
    except OSError as exc:
        raise CertificateFault(holder, path, exc.strerror or str(exc)) from None
    same = read(CERT_FILE, cert_file) == content
    if not same or (key_file is not None and read(KEY_FILE, key_file) != key):
        raise CertificateFault(CERT_FILE, cert_file, "has changed while it was read")
    return chain


def client_context(
    ca_file: str | None, cert_file: str | None, key_file: str | None
) -> tuple[ssl.SSLContext, list[Certificate]]:
    """Return the context of a client, and the certificate that it presents, if any.

    It trusts the authorities in *ca_file*; None: the system's. It blocks, for 20 ms.

    Raises:
        OSError: *ca_file* cannot be read, or holds no certificate.
        CertificateFault: as `load_pair`.
    """
    context = ssl.create_default_context(cafile=ca_file)
    return context, [] if cert_file is None else load_pair(context, cert_file, key_file)


def read_pair(cert_file: str, key_file: str | None) -> list[Certificate]:
    """Return the certificate and the intermediates of a pair that matches. It blocks.

    Raises:
        CertificateFault: as `load_pair`.
    """
    return load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert_file, key_file)


def load_authorities(path: str, context: ssl.SSLContext | None = None) -> list[Certificate]:
    """Let *context* trust the authorities in *path*, and return them. It blocks.

    Raises:
        CertificateFault: the file holds no certificate.
    """
    content = read(CLIENT_CA_FILE, path)
    authorities = _certificates(CLIENT_CA_FILE, path, content)
    try:
        context = context or ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except ssl.SSLError as exc:
        message = f"cannot be used: {reason_of(exc)}"
        raise CertificateFault(CLIENT_CA_FILE, path, message) from None
    return authorities


def read(setting: str, path: str) -> bytes:
    """Return the content of the file *path* that *setting* names.

    Raises:
        CertificateFault: it cannot be read, is no regular file, or is too large.
    """
    # A pipe would be empty at the next read, or block everything.
    if os.path.exists(path) and not Path(path).is_file():  # noqa: PTH110
        raise CertificateFault(setting, path, "is not a regular file")
    try:
        return read_file(path, "no such file")
    except UnreadableFile as exc:
        raise CertificateFault(setting, path, str(exc)) from None


def find_key(name: str, environ: Mapping[str, str]) -> str:
    """Return the path of the key file *name*, which may be among the credentials of systemd."""
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if credentials and os.path.lexists(found := os.path.join(credentials, name)):  # noqa: PTH118
        return found
    return name


def first_end(chain: Iterable[Certificate]) -> int:
    """Return the end of the first of *chain* to expire, in seconds since 1970."""
    return min(certificate.expires for certificate in chain)


def ends_soon(expires: float) -> str | None:
    """Return the warning about a certificate that *expires* soon, or has expired.

    None: it does not end within SOON seconds.
    """
    left = expires - time.time()
    if left > SOON:
        return None
    if left <= 0:
        return f"the certificate has expired on {day(expires)}"
    days = round(left / 86400)
    return f"the certificate expires on {day(expires)}, in {days} day{'s' * (days != 1)}"


def day(moment: float) -> str:
    """Return the day of *moment*, in seconds since 1970, in UTC."""
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d}"


def reason_of(exc: ssl.SSLError) -> str:
    """Return OpenSSL's reason for a failure, in small letters."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return exc.verify_message
    return (exc.reason or "unknown reason").lower().replace("_", " ")


def _certificates(setting: str, path: str, content: bytes) -> list[Certificate]:
    try:
        found = x509.certificates(content)
    except x509.Malformed as exc:
        raise CertificateFault(setting, path, f"cannot be used: {exc}") from None
    if not found:
        raise CertificateFault(setting, path, "holds no certificate")
    return found
