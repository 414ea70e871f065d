"""Anthropic's form of errors and of the list of models, for the clients that speak its API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserver.faces.form import Form
from aioserver.wings.anthropic import wire
from aioserver.wings.anthropic.api import MESSAGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aioserver.config import settings
    from aioserver.errors import AioserverError


class MessagesForm(Form):
    """Anthropic's form."""

    api = MESSAGES
    id_header = "request-id"

    def speaks(self, path: str, headers: Mapping[str, str]) -> bool:
        """Return whether a client that asks for *path* with *headers* expects this form."""
        return wire.speaks(path, headers)

    def error(self, error: AioserverError, request_id: str) -> bytes:
        """Return *error* as the body of a response to the request with this id."""
        return wire.error_body(error, request_id)

    def model(self, name: str, provider: settings.Provider) -> dict[str, Any]:  # noqa: ARG002
        """Return the model *name*."""
        return wire.model_object(name)

    def models(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the list of models with these *entries*."""
        return wire.model_list(entries)
