"""The certificate of the listener: its dates, its names, and the chain that it is shown with."""

from __future__ import annotations

import ssl
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from aioserver.files import x509
from aioserver.files.certificates import day, ends_soon, first_end

if TYPE_CHECKING:
    from aioserver.config.settings import Tls
    from aioserver.files.x509 import Certificate
    from aioserver.tools.doctor.findings import Report

SUBJECT = "tls"
SECONDS_A_DAY = 86400
# Names of a certificate that are shown.
MAX_NAMES = 5


def examine(report: Report, tls: Tls) -> None:
    """Examine the files of *tls*, which were found to be usable."""
    chain = x509.certificates(Path(tls.cert_file).read_bytes())
    _tell_dates(report, chain)
    _tell_names(report, chain[0])
    _tell_chain(report, chain, _system_subjects())
    if tls.client_ca_file is not None:
        authorities = x509.certificates(Path(tls.client_ca_file).read_bytes())
        report.ok(SUBJECT, f"clients must be known to one of {len(authorities)} authorities")


def _tell_dates(report: Report, chain: list[Certificate]) -> None:
    expires, now = first_end(chain), time.time()
    begins = max(certificate.begins for certificate in chain)
    if begins > now:
        report.fail(SUBJECT, f"the certificate is not valid before {day(begins)}", "see the clock")
    elif (text := ends_soon(expires)) is not None:
        problem = report.fail if expires <= now else report.warn
        problem(SUBJECT, text, "renew it: the files are read again within seconds")
    else:
        days = (expires - now) / SECONDS_A_DAY
        report.ok(SUBJECT, f"the certificate is valid until {day(expires)}, for {days:.0f} days")


def _tell_names(report: Report, certificate: Certificate) -> None:
    names = certificate.names
    if not names:
        report.fail(SUBJECT, "the certificate has no name", "clients look for the host in it")
        return
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    report.ok(SUBJECT, f"clients may connect to {', '.join(names[:MAX_NAMES])}{more}")


def _tell_chain(report: Report, chain: list[Certificate], known: set[bytes]) -> None:
    """Tell whether each certificate is followed by that of its issuer, up to one that clients
    know: *known* are the subjects of the system's authorities.
    """
    for certificate, issuer in pairwise(chain):
        if certificate.issuer != issuer.subject:
            report.fail(
                SUBJECT,
                "the certificates in cert_file are not in order, each before that of its issuer",
                "put the server's first, then its intermediates (fullchain.pem)",
            )
            return
    last = chain[-1]
    if last.issuer in known:
        report.ok(SUBJECT, "its issuer is an authority that this system knows")
    else:
        what = "it is signed by itself" if last.self_signed else "this system knows no such issuer"
        report.warn(
            SUBJECT,
            f"{what}: clients have to trust it by a file, unless an intermediate is missing",
            "put the intermediates into cert_file, or give clients the authority (SSL_CERT_FILE)",
        )


def _system_subjects() -> set[bytes]:
    subjects = set()
    for der in ssl.create_default_context().get_ca_certs(binary_form=True):
        try:
            subjects.add(x509.certificate(der).subject)
        except x509.Malformed:
            continue
    return subjects
