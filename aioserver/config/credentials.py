"""The keys and certificates that settings name: read from files and from the environment.

A setting `api_key_file` or `key_file` names a file, `api_key_env` or `key_env` a variable. Of a
client's key only the SHA-256 is kept. No fault and no output shows a key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.config.schema import FAULTY, Secret, changed
from aioserver.config.validators import unfit
from aioserver.files.reading import reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioserver.config.document import Document, Fault, KeyPath
    from aioserver.config.llm import Provider
    from aioserver.config.settings import ClientKey, Tls

# The hash that a shell computes when the variable with the key is not set.
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


def key_fault(digest: str | None, names: Mapping[str | None, str]) -> str | None:
    """Return why the key with this SHA-256 cannot be used beside those whose *names* are known by
    their own; None: it can.
    """
    if digest == EMPTY_SHA256:
        return "the hash of an empty key, which anybody could send"
    return f"the same key as {names[digest]}" if digest in names else None


class Credentials:
    """Finds keys for *document*, and adds a fault to it for each that cannot be used.

    The settings may have been made of a faulty document: the fault of a value that is `FAULTY` is
    reported already, and the key that it names is `FAULTY` as well.

    *again*: the document was loaded before. A pipe with a key was read to its end then, and a
    second reading would wait for ever; such a pipe is a fault.
    """

    def __init__(self, document: Document, environ: Mapping[str, str], *, again: bool) -> None:
        # Warnings for the author about certificates.
        self.warnings: list[Fault] = []
        # Certificates of providers that were checked: several providers may have the same.
        self._pairs: set[tuple[str | None, str | None]] = set()
        self._document = document
        self._environ = environ
        self._again = again

    def of_provider(self, name: str, provider: Provider) -> Any:
        """Return the key of *provider*: the one in its settings, in its file or in its variable.

        None means that no key was found, which is a fault only for a provider that is needed.
        """
        path = ("llm", "providers", name)
        if isinstance(provider.ca_file, str) and not Path(provider.ca_file).is_file():
            self._refuse((*path, "ca_file"), "no such file")
        if provider.api_key is not None:
            return provider.api_key
        key = self._from_file(provider.api_key_file, (*path, "api_key_file"))
        if key is not None:
            return key
        return self._from_variable(provider.variable(name), (*path, "api_key_env"))

    def of_clients(self, keys: tuple[ClientKey, ...]) -> tuple[ClientKey, ...]:
        """Return *keys* with `sha256` instead of `key_env` or `key_file`, without faulty ones."""
        usable: list[ClientKey] = []
        names: dict[str | None, str] = {}
        for index, key in enumerate(keys):
            path = ("auth", "keys", index)
            digest: Any = key.sha256
            if isinstance(digest, str):
                digest = digest.lower()
            elif key.key_file is not None:
                digest = _hashed(self._from_file(key.key_file, (*path, "key_file")))
            else:
                digest = _hashed(self._from_variable(key.key_env, (*path, "key_env")))
            if digest is None and (source := key.key_file or key.key_env) is not None:
                self._refuse(path, f"{source} holds no key")
            elif (fault := key_fault(digest, names)) is not None:
                self._refuse(path, fault)
            elif digest is not None and digest is not FAULTY:
                names[digest] = key.name
                usable.append(changed(key, sha256=digest, key_env=None, key_file=None))
        return tuple(usable)

    def of_listener(self, tls: Tls | None) -> Tls | None:
        """Return *tls* with the path of its key. Its files are loaded once, to find faults."""
        path = ("chat", "websocket", "tls")
        if tls is None or tls is FAULTY or FAULTY in tls.files:
            return None
        # Without TLS a start needs neither this nor OpenSSL.
        from aioserver.files import certificates  # noqa: PLC0415

        if tls.key_file is not None:
            tls = changed(tls, key_file=certificates.find_key(tls.key_file, self._environ))
        self._load_pair(path, "", tls.cert_file, tls.key_file)
        if (authorities := tls.client_ca_file) is not None:
            try:
                certificates.load_authorities(authorities)
            except certificates.CertificateFault as fault:
                self._refuse((*path, fault.setting), fault.message)
        return tls

    def client_key(self, provider: Provider) -> str | None:
        """Return the path of the private key of our certificate for *provider*."""
        if provider.client_key_file is None:
            return None
        from aioserver.files import certificates  # noqa: PLC0415 - as above

        return certificates.find_key(provider.client_key_file, self._environ)

    def check_pair(self, name: str, provider: Provider) -> None:
        """Check our certificate for *provider*, unless another provider has the same."""
        path = ("llm", "providers", name)
        cert_file, key_file = pair = provider.client_cert_file, provider.client_key_file
        if provider is FAULTY or FAULTY in pair or pair in self._pairs:
            return
        self._pairs.add(pair)
        if cert_file is None:
            if key_file is not None:
                self._refuse((*path, "client_key_file"), "there is no client_cert_file")
        else:
            self._load_pair(path, "client_", cert_file, self.client_key(provider))

    def _load_pair(self, path: KeyPath, prefix: str, cert: str, key: str | None) -> None:
        """Load a pair once, to find its faults, and whether it expires soon. Its settings begin
        with *prefix*. No fault names a file: a secret may stand in its place.
        """
        from aioserver.files import certificates  # noqa: PLC0415 - as above

        try:
            chain = certificates.read_pair(cert, key)
        except certificates.CertificateFault as fault:
            self._refuse((*path, prefix + fault.setting), fault.message)
            return
        if (warning := certificates.ends_soon(certificates.first_end(chain))) is not None:
            self.warnings.append(self._document.fault((*path, f"{prefix}cert_file"), warning))

    def _from_file(self, name: Any, path: KeyPath) -> Any:
        """Return the key in the file *name*; None if there is no such file or *name* is None."""
        if not isinstance(name, str):
            return name
        credentials = self._environ.get("CREDENTIALS_DIRECTORY")
        for folder in ([credentials] if credentials else []) + ["."]:
            file = Path(folder, name)
            try:
                if self._again and file.is_fifo():
                    return self._refuse(path, "is a pipe, which cannot be read again")
                text = file.read_text("utf-8")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as exc:
                return self._refuse(path, f"cannot be read: {reason(exc)}")
            return self._as_secret(text.strip(), path, "the file")
        return None

    def _from_variable(self, name: Any, path: KeyPath) -> Any:
        """Return the key in the variable *name*.

        None if it is empty or not set, or *name* is None.
        """
        if not isinstance(name, str):
            return name
        value = self._environ.get(name, "").strip()
        return self._as_secret(value, path, name) if value else None

    def _as_secret(self, key: str, path: KeyPath, source: str) -> Any:
        fault = unfit(key)
        return Secret(key) if fault is None else self._refuse(path, f"{source} {fault}")

    def _refuse(self, path: KeyPath, message: str) -> Any:
        self._document.faults.append(self._document.fault(path, message))
        return FAULTY


def _hashed(key: Any) -> Any:
    return hashlib.sha256(key.reveal().encode()).hexdigest() if isinstance(key, Secret) else key
