"""The reader of certificates, against those of a library that makes them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import trustme
from cryptography import x509 as reference
from cryptography.hazmat.primitives.serialization import Encoding

from aioserver.files import x509

CA = trustme.CA(organization_name="ours")
NAMES = ("localhost", "*.example.org", "127.0.0.1", "::1")


def issue(year: int = 2040, *names: str, common: str | None = None) -> bytes:
    end = datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC)
    certificate = CA.issue_cert(*names, common_name=common, not_after=end)
    return certificate.cert_chain_pems[0].bytes()


@pytest.mark.parametrize("year", [2031, 2049, 2050, 2999])
def test_dates_are_those_of_the_certificate(year: int) -> None:
    """Up to 2049 a date has two digits of its year."""
    pem = issue(year, "localhost")

    (read,) = x509.certificates(pem)

    expected = reference.load_pem_x509_certificate(pem)
    assert read.expires == int(expected.not_valid_after_utc.timestamp())
    assert read.begins == int(expected.not_valid_before_utc.timestamp())


def test_names_are_hosts_and_addresses() -> None:
    (read,) = x509.certificates(issue(2040, *NAMES))
    assert read.names == NAMES


def test_common_name_is_none_of_them() -> None:
    (read,) = x509.certificates(CA.cert_pem.bytes())
    assert read.self_signed
    assert read.names == ()
    (read,) = x509.certificates(issue(2040, "a", common="b"))
    assert read.names == ("a",)


def test_issuer_is_the_subject_of_its_authority() -> None:
    (ours,) = x509.certificates(CA.cert_pem.bytes())
    (read,) = x509.certificates(issue(2040, *NAMES))
    assert read.issuer == ours.subject
    assert not read.self_signed


def test_chain_is_read_in_order_and_other_blocks_are_skipped() -> None:
    child = CA.create_child_ca()
    certificate = child.issue_cert("localhost")
    chain = x509.certificates(certificate.private_key_and_cert_chain_pem.bytes())
    assert [entry.names for entry in chain] == [("localhost",), ()]
    assert chain[0].issuer == chain[1].subject


def test_every_cut_is_malformed_and_nothing_else_is_raised() -> None:
    pem = issue(2040, *NAMES)
    der = reference.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    for size in range(len(der)):
        with pytest.raises(x509.Malformed):
            x509.certificate(der[:size])
    for at in range(len(der)):
        changed = bytearray(der)
        changed[at] ^= 0xFF
        try:
            x509.certificate(bytes(changed))
        except x509.Malformed:
            continue


def test_what_is_no_base64_is_malformed() -> None:
    with pytest.raises(x509.Malformed):
        x509.certificates(b"-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----")
