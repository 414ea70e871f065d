"""Providers that inherit the settings of another: `like`.

The values of a document are merged before they are validated, so that the rules between settings
apply to the result. `http_client` is merged key by key, and every other key is replaced whole.
`base_url` and `simulated` are one setting for this purpose, and so are the three that say where
the key is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.config.hints import nearest
from aioserver.config.llm import KEY_VARIABLES, HttpClient
from aioserver.config.schema import FAULTY, show

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import voluptuous as vol

    from aioserver.config.document import Document

KEYS = ("api_key", "api_key_env", "api_key_file")
# Groups of settings; setting one replaces all of its group.
TOGETHER = (("base_url", "simulated"), KEYS)


class Inheritance:
    """The inheritance between the providers of *document*. Their values are merged when this object
    is made.

    A provider whose `like` leads nowhere becomes faulty, with its fault in the document.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        llm = document.values.get("llm")
        providers = llm.get("providers") if isinstance(llm, dict) else None
        self._providers: dict[str, Any] = providers if isinstance(providers, dict) else {}
        # For each provider that has `like`: the other one.
        self.likes: dict[str, str] = {}
        # For each provider: the one whose settings say where its key is.
        self.key_owners: dict[str, str] = {name: name for name in self._providers}
        merged: dict[str, Any] = {}
        for name in self._providers:
            self._merge(name, merged, ())
        self._providers.update(merged)

    def _merge(self, name: str, merged: dict[str, Any], above: tuple[str, ...]) -> Any:
        """Return the merged values of the provider *name*; *above* are the providers that inherit
        from it.
        """
        if name in merged:
            return merged[name]
        values = self._providers[name]
        like = values.get("like") if isinstance(values, dict) else None
        if not isinstance(like, str):
            merged[name] = values
            return values
        path = ("llm", "providers", name, "like")
        if like not in self._providers:
            known = [other for other in self._providers if other != name]
            text = f"{show(like)} is not among llm.providers ({', '.join(known)})"
            merged[name] = self._refuse(path, text + nearest(like, known))
        elif like in (*above, name):
            circle = [*above, name]
            names = [*circle[circle.index(like) :], like]
            merged[name] = self._refuse(path, f"leads in a circle: {' → '.join(names)}")
        else:
            other = self._merge(like, merged, (*above, name))
            self.likes[name] = like
            merged[name] = other if other is FAULTY else self._both(name, values, like, other)
        return merged[name]

    def _both(self, name: str, own: dict[str, Any], like: str, other: Any) -> Any:
        """Return the values of *own*, completed by those of *other*."""
        if not isinstance(other, dict):
            return own
        other = {key: value for key, value in other.items() if key != "like"}
        other["http_client"] = other.get("http_client") or HttpClient.SHIPPED()
        named = KEY_VARIABLES.get(like)
        if named is not None and not any(other.get(key) for key in (*KEYS, "simulated")):
            other["api_key_env"] = named
        for names in TOGETHER:
            if any(key in own for key in names):
                other = {key: value for key, value in other.items() if key not in names}
        if not any(key in own for key in KEYS):
            if name in KEY_VARIABLES:
                other = {key: value for key, value in other.items() if key not in KEYS}
            else:
                self.key_owners[name] = self.key_owners[like]
        both = other | own
        client = own.get("http_client") or {}
        if isinstance(client, dict) and isinstance(other["http_client"], dict):
            both["http_client"] = other["http_client"] | client
        return both

    def _refuse(self, path: tuple[str, ...], message: str) -> Any:
        self._document.faults.append(self._document.fault(path, message))
        return FAULTY

    def without_inherited(self, errors: Iterable[vol.Invalid]) -> Iterator[vol.Invalid]:
        """Yield the *errors* that a provider has not inherited from another one."""
        errors = list(errors)
        known = {(_at(error), str(error.error_message)) for error in errors}
        for error in errors:
            path = _at(error)
            inside = path[:2] == ("llm", "providers") and len(path) > 2
            other = self.likes.get(str(path[2])) if inside else None
            if (
                other is None
                or ((*path[:2], other, *path[3:]), str(error.error_message)) not in known
            ):
                yield error


def _at(error: vol.Invalid) -> tuple[object, ...]:
    return tuple(error.path)
