"""Configuration: a YAML file and the environment to settings; every fault at once.

    configuration = Configuration.load("config.yaml")
    configuration.settings.chat.websocket.port

A fault is one line, `file:line:column path: message (hint)`, with the place of the key, for a
missing one that of its section; what a variable says has the variable for a place. Secrets come by
name (`api_key_env`, `api_key_file`), are resolved here, and are in no message and no output.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioserver.config import schema
from aioserver.config.document import PREFIX, Document, Fault, Place, Steps
from aioserver.config.schema import FAULTY, Faults, Secret
from aioserver.config.settings import SETTINGS, Auth, ClientKey, Provider, Settings
from aioserver.config.validators import unfit
from aioserver.errors import ConfigurationError
from aioserver.protocol.addresses import loopback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SHIPPED = Path(__file__).parent.with_name("config.yaml")
EMPTY = hashlib.sha256(b"").hexdigest()  # what a variable that is not set gives in a shell
MAX_FILE_BYTES = 2**20  # of a configuration; a key file is far below, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Valid settings, where they come from, and what their writer should know."""

    settings: Settings
    source: str
    warnings: tuple[str, ...]
    _document: Document = field(repr=False, compare=False)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        again: bool = False,
    ) -> Configuration:
        """Read *path*, else `$AIOSERVER_CONFIG`, else `./config.yaml`, else the shipped file.

        *again*: it was read before. A pipe with a key has given what it had, and is not waited for.

        Raises:
            ConfigurationError: with every fault of the file, of the variables that override it,
                and of the key files it names.
        """
        environ = os.environ if environ is None else environ
        document = _read(_find(path, environ), environ)
        for name in sorted(environ):
            if name.startswith(PREFIX):
                document.override(name, environ[name])
        try:
            settings = SETTINGS(document.values)
        except Faults as exc:
            settings = exc.partial
            document.faults += [
                document.fault(error.path, error.error_message) for error in exc.errors
            ]
        secrets = _Secrets(document, environ, again=again)
        keys = {
            name: secrets.of_provider(name, each) for name, each in settings.llm.providers.items()
        }
        callers = secrets.of_callers(settings.auth.keys if settings.auth is not None else ())
        if document.faults:
            raise ConfigurationError(_lines(document.faults))
        providers = {
            name: replace(each, name=name, api_key=keys[name], api_key_env=each.variable(name))
            for name, each in settings.llm.providers.items()
        }
        settings = replace(settings, llm=replace(settings.llm, providers=providers))
        if settings.auth is not None:
            settings = replace(settings, auth=replace(settings.auth, keys=callers))
        return cls(
            settings=settings,
            source=document.source,
            warnings=tuple(_lines(_warnings(settings, document))),
            _document=document,
        )

    def get_websocket_concurrency_config(self) -> dict[str, Any]:
        """`chat.websocket.concurrency` as a dict, with its "uvicorn"."""
        concurrency: dict[str, Any] = schema.plain(self.settings.chat.websocket.concurrency)
        return concurrency

    def get_http_client_config(self, name: str | None = None) -> dict[str, Any]:
        """`http_client` of the provider *name*, else of the active one, as a dict.

        Raises:
            ValueError: no such provider.
        """
        llm = self.settings.llm
        provider = llm.providers.get(llm.active if name is None else name)
        if provider is None:
            raise ValueError(f"no provider {name!r}; configured: {', '.join(llm.providers)}")
        client: dict[str, Any] = schema.plain(provider.http_client)
        return client

    def check_usable(self, hosts: Sequence[str] | None = None) -> None:
        """Refuse what is valid and still cannot serve.

        *hosts*: the addresses that others may reach it by, where these are not the configured host.

        Raises:
            ConfigurationError: the active provider or a fallback lacks its key, or an address
                that others can reach has no keys.
        """
        if hosts is None:
            hosts = (self.settings.chat.websocket.host,)
        faults = list(self._unusable(hosts))
        if faults:
            raise ConfigurationError(_lines(faults))

    def effective(self) -> dict[str, Any]:
        """Every setting as plain data, defaults and overrides included, secrets as `***`."""
        data: dict[str, Any] = schema.plain(self.settings)
        return data

    def not_enforced(self) -> tuple[str, ...]:
        """The settings that ask for something which this version does not do yet."""
        return tuple(schema.not_enforced(self.settings))

    def _unusable(self, hosts: Sequence[str]) -> Iterator[Fault]:
        llm, document = self.settings.llm, self._document
        provider = llm.providers[llm.active]
        if provider.missing_key is not None:
            demo = next((each.name for each in llm.providers.values() if each.simulated), None)
            way = f"set llm.active: {demo or 'demo, with the provider demo that init writes'}"
            why = f"{llm.active} is active but {_lacks(provider)}; set it, or {way}"
            yield document.fault(("llm", "active"), why)
        for at, name in enumerate(llm.fallbacks):
            provider = llm.providers[name]
            if provider.missing_key is not None and name != llm.active:
                why = f"{name} is a fallback but {_lacks(provider)}; set it, or take {name} out"
                yield document.fault(("llm", "fallbacks", at), why)
        auth = self.settings.auth
        guarded = auth is not None and (auth.open or auth.keys)
        for host in dict.fromkeys(hosts):
            if guarded or loopback(host):
                continue
            yield document.fault(
                ("chat", "websocket", "host"),
                f"{host} is open to others, and nobody is asked for a key: listen on localhost, "
                "give keys to clients (`aioserver key NAME` makes one for auth.keys), or set "
                "`auth: {open: true}` behind a proxy that guards the door",
            )


class _Secrets:
    """Finds the secrets that the settings name. Its faults go into the document.

    The settings may be partial: what is FAULTY has its fault already, and stays FAULTY.
    """

    def __init__(self, document: Document, environ: Mapping[str, str], *, again: bool) -> None:
        self._document = document
        self._environ = environ
        self._again = again

    def of_provider(self, name: str, provider: Provider) -> Any:
        """The key of *provider*: from itself, else from its file, else from its variable."""
        path = ("llm", "providers", name)
        if isinstance(provider.ca_file, str) and not Path(provider.ca_file).is_file():
            self._refuse((*path, "ca_file"), "no such file")
        if provider.api_key is not None:
            return provider.api_key
        key = self._from_file(provider.api_key_file, (*path, "api_key_file"))
        if key is not None:
            return key
        return self._from_variable(provider.variable(name), (*path, "api_key_env"))

    def of_callers(self, callers: tuple[ClientKey, ...]) -> tuple[ClientKey, ...]:
        """*callers* with the hash of each key; one that cannot be found is a fault."""
        found: dict[str, ClientKey] = {}
        for at, caller in enumerate(callers):
            path = ("auth", "keys", at)
            digest: Any = caller.sha256
            if isinstance(digest, str):
                digest = digest.lower()
            elif caller.key_file is not None:
                digest = self._hashed(self._from_file(caller.key_file, (*path, "key_file")))
            else:
                digest = self._hashed(self._from_variable(caller.key_env, (*path, "key_env")))
            if digest is None and (source := caller.key_file or caller.key_env) is not None:
                self._refuse(path, f"{source} holds no key")
            elif digest == EMPTY:
                self._refuse(path, "the hash of no key: everybody would come in")
            elif digest in found:
                self._refuse(path, f"the same key as {found[digest].name}")
            elif digest is not None and digest is not FAULTY:
                found[digest] = replace(caller, sha256=digest, key_env=None, key_file=None)
        return tuple(found.values())

    def _hashed(self, key: Any) -> Any:
        return (
            hashlib.sha256(key.reveal().encode()).hexdigest() if isinstance(key, Secret) else key
        )

    def _from_file(self, name: Any, path: Steps) -> Any:
        """The key in the file *name*; None: there is no such file."""
        if not isinstance(name, str):
            return name
        credentials = self._environ.get("CREDENTIALS_DIRECTORY")
        for folder in ([credentials] if credentials else []) + ["."]:
            file = Path(folder, name)
            try:
                if self._again and file.is_fifo():
                    return self._refuse(path, "is no file that can be read again")
                text = file.read_text("utf-8")
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as exc:
                return self._refuse(path, f"cannot be read: {_why(exc)}")
            return self._fit(text.strip(), path, "the file")
        return None

    def _from_variable(self, name: Any, path: Steps) -> Any:
        """The key in the variable *name*; None: it is not set, or empty."""
        if not isinstance(name, str):
            return name
        value = self._environ.get(name, "").strip()
        return self._fit(value, path, name) if value else None

    def _fit(self, key: str, path: Steps, where: str) -> Any:
        why = unfit(key)
        return Secret(key) if why is None else self._refuse(path, f"{where} {why}")

    def _refuse(self, path: Steps, message: str) -> Any:
        self._document.faults.append(self._document.fault(path, message))
        return FAULTY


def _find(path: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> str:
    given = path or environ.get("AIOSERVER_CONFIG")
    if given:
        return os.fspath(given)
    # Not `exists`: a dangling link is somebody's configuration, and its absence a fault.
    return "config.yaml" if os.path.lexists("config.yaml") else str(SHIPPED)


def _read(source: str, environ: Mapping[str, str]) -> Document:
    """The document in the file *source*: a mapping, maybe with faults inside.

    Raises:
        ConfigurationError: nothing in it can be used.
    """
    document = Document(source)
    try:
        with Path(source).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigurationError([f"{source}: larger than {MAX_FILE_BYTES} bytes"])
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        column = exc.start - exc.object.rfind(b"\n", 0, exc.start)
        raise ConfigurationError([f"{Place(line, column, source)}: not UTF-8"]) from None
    except (OSError, ValueError) as exc:
        raise ConfigurationError([f"{source}: cannot be read: {_why(exc)}"]) from None
    document.read(text, environ)
    if not isinstance(document.values, dict):
        if document.values is None:
            document.faults.append(document.fault((), "the file is empty"))
        elif document.values is not FAULTY:
            why = f"expected a section of keys, not {schema.kind(document.values)}"
            document.faults.append(document.fault((), why))
        raise ConfigurationError(_lines(document.faults))
    return document


def _warnings(settings: Settings, document: Document) -> Iterator[Fault]:
    yield from _ignored(Settings, document.values, (), document)
    auth = settings.auth or Auth()
    if "*" in settings.chat.websocket.allow_origins and not auth.keys:
        origins = ("chat", "websocket", "allow_origins")
        yield document.fault(origins, 'with "*" and no keys every page on the web may chat')
    if auth.open:
        yield document.fault(("auth", "open"), "everybody who reaches the port may chat")
    for name in settings.llm.providers:
        path = ("llm", "providers", name, "api_key")
        written = document.values["llm"]["providers"][name].get("api_key") is not None
        if written and path not in document.referenced:
            yield document.fault(path, "a key in a file is soon in many (use api_key_env)")
    if "%(" in str((document.values.get("logging") or {}).get("format")):
        yield document.fault(("logging", "format"), "read as console; json is the other choice")


def _ignored(cls: type[Any], values: Any, path: Steps, document: Document) -> Iterator[Fault]:
    """A warning for each key that the original has and that has no part here."""
    for key in getattr(cls, "IGNORED", ()):
        if key in values:
            yield document.fault((*path, key), "ignored: it has no part here")
    for each in schema.fields(cls):
        inner, value = each.metadata["check"].inner, values.get(each.name)
        if inner is not None and isinstance(value, dict):
            yield from _ignored(inner, value, (*path, each.name), document)


def _lines(faults: list[Fault] | Iterator[Fault]) -> list[str]:
    return list(dict.fromkeys(str(fault) for fault in sorted(faults)))


def _lacks(provider: Provider) -> str:
    return f"{provider.missing_key} is not {'set' if provider.api_key_env else 'there'}"


def _why(exc: Exception) -> str:
    """The reason in words; never with a part of what was read."""
    if isinstance(exc, UnicodeError):
        return "it is not UTF-8"
    return (
        exc.strerror or "unknown reason"
        if isinstance(exc, OSError)
        else "no such name is possible"
    )
