"""Files of certificates: what is a fault of them, and where it is reported."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from aioserver.config import Configuration
from aioserver.config.faults import ConfigurationError
from aioserver.files import certificates
from aioserver.files.certificates import CertificateFault, day, ends_soon, load_pair
from aioserver.files.reading import MAX_FILE_BYTES
from tests.support.server import NOWHERE, configured
from tests.support.tls import TLS, authority, pair

if TYPE_CHECKING:
    from pathlib import Path

PROVIDER = "llm.providers.sim"


def split(folder: Path, of: str = "ours") -> tuple[Path, Path]:
    """Write a certificate and its key to two files."""
    certificate = authority(of).issue_cert("localhost")
    cert, key = folder / f"{of}.crt", folder / f"{of}.key"
    cert.write_bytes(certificate.cert_chain_pems[0].bytes())
    key.write_bytes(certificate.private_key_pem.bytes())
    return cert, key


def encrypted(key: Path) -> Path:
    """Encrypt *key* with a password."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    hidden = key.with_suffix(".hidden")
    hidden.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"canary"),
        )
    )
    return hidden


def faults(folder: Path, **changes: object) -> list[str]:
    """The faults of a configuration with *changes*, without its name and place."""
    with pytest.raises(ConfigurationError) as raised:
        configured(NOWHERE, changes, folder / "config.yaml")
    return [line.partition(" ")[2] for line in raised.value.faults]


def test_pair_may_be_in_one_file_or_in_two(tmp_path: Path) -> None:
    cert, key = split(tmp_path)
    one = pair(tmp_path)

    for section in (one, {"cert_file": str(cert), "key_file": str(key)}):
        settings = configured(NOWHERE, {TLS: section}, tmp_path / "config.yaml").settings
        assert settings.chat.websocket.tls is not None
        assert settings.chat.websocket.scheme == "https"


def test_key_is_looked_for_among_the_credentials_of_systemd_first(tmp_path: Path) -> None:
    cert, key = split(tmp_path)
    (tmp_path / "given").mkdir()
    key.rename(tmp_path / "given" / "tls.key")
    file = tmp_path / "config.yaml"
    with pytest.raises(ConfigurationError):
        configured(NOWHERE, {TLS: {"cert_file": str(cert), "key_file": "tls.key"}}, file)

    loaded = Configuration.load(file, environ={"CREDENTIALS_DIRECTORY": str(tmp_path / "given")})

    assert loaded.settings.chat.websocket.tls is not None
    assert loaded.settings.chat.websocket.tls.key_file == str(tmp_path / "given" / "tls.key")


def test_faults_of_the_listener_say_which_file_is_meant(tmp_path: Path) -> None:
    cert, key = split(tmp_path)
    _, other = split(tmp_path, "others")
    rsa = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("x", key_type=trustme.KeyType.RSA)
    rsa.private_key_pem.write_to_path(str(tmp_path / "rsa.key"))
    (tmp_path / "empty").write_text("")
    (tmp_path / "cut").write_bytes(cert.read_bytes()[:-60] + b"-----END CERTIFICATE-----\n")

    def said(**section: object) -> list[str]:
        return faults(tmp_path, **{TLS: {name: str(path) for name, path in section.items()}})

    mismatch = "chat.websocket.tls.key_file: the key does not belong to the certificate"
    assert said(cert_file=tmp_path / "no") == ["chat.websocket.tls.cert_file: no such file"]
    assert said(cert_file=key) == ["chat.websocket.tls.cert_file: holds no certificate"]
    assert said(cert_file=tmp_path) == ["chat.websocket.tls.cert_file: is not a regular file"]
    assert said(cert_file=cert) == [
        "chat.websocket.tls.cert_file: holds no key, and there is no key_file"
    ]
    assert said(cert_file=cert, key_file=tmp_path / "empty") == [
        "chat.websocket.tls.key_file: holds no key"
    ]
    assert said(cert_file=cert, key_file=other) == [mismatch]
    assert said(cert_file=cert, key_file=tmp_path / "rsa.key") == [mismatch]
    assert said(cert_file=cert, key_file=encrypted(key)) == [
        f"{TLS}.key_file: the key is encrypted: its password cannot be entered at each start"
    ]
    (cut,) = said(cert_file=tmp_path / "cut", key_file=key)
    assert cut.startswith("chat.websocket.tls.cert_file: cannot be used")
    assert said(cert_file=cert, key_file=key, client_ca_file=key) == [
        "chat.websocket.tls.client_ca_file: holds no certificate"
    ]


def test_fault_has_the_place_of_its_setting(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    with pytest.raises(ConfigurationError) as raised:
        configured(NOWHERE, {TLS: {"cert_file": "no"}}, file)

    number = file.read_text()[: file.read_text().index("cert_file")].count("\n") + 1
    assert raised.value.faults == (
        f"{file}:{number}:7 chat.websocket.tls.cert_file: no such file",
    )


def test_faults_of_a_providers_certificate(tmp_path: Path) -> None:
    cert, _ = split(tmp_path)
    _, other = split(tmp_path, "others")

    assert faults(tmp_path, **{f"{PROVIDER}.client_key_file": str(other)}) == [
        f"{PROVIDER}.client_key_file: there is no client_cert_file"
    ]
    changes = {
        f"{PROVIDER}.client_cert_file": str(cert),
        f"{PROVIDER}.client_key_file": str(other),
    }
    assert faults(tmp_path, **changes) == [
        f"{PROVIDER}.client_key_file: the key does not belong to the certificate"
    ]


@pytest.mark.parametrize(("days", "words"), [(-1, "has expired on"), (10, "in 10 days")])
def test_end_of_a_certificate_is_a_warning(tmp_path: Path, days: float, words: str) -> None:
    section = pair(tmp_path, days=days)

    loaded = configured(NOWHERE, {TLS: section}, tmp_path / "config.yaml")

    (warning,) = [line for line in loaded.warnings if "tls" in line]
    assert words in warning


def test_certificate_that_is_valid_for_long_is_no_warning(tmp_path: Path) -> None:
    assert ends_soon((datetime.now(UTC) + timedelta(days=20)).timestamp()) is None
    assert day(0) == "1970-01-01"


def test_pair_that_changes_while_it_is_read_is_not_used(tmp_path: Path) -> None:
    """The bytes that were checked are those that were loaded."""
    section = pair(tmp_path)

    class Context(ssl.SSLContext):
        def load_cert_chain(self, *args: object, **kwargs: object) -> None:
            super().load_cert_chain(*args, **kwargs)  # type: ignore[arg-type]
            pair(tmp_path)

    with pytest.raises(CertificateFault, match="has changed while it was read"):
        load_pair(Context(ssl.PROTOCOL_TLS_SERVER), section["cert_file"], None)


def test_large_file_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(CertificateFault, match="larger than"):
        certificates.read("cert_file", str(tmp_path / "large"))
