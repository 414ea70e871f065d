"""Whether a provider has `/v1/responses`, as its settings say and as it was found out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserver.config import settings


class Bridging:
    """Whether responses are translated to chat completions at one provider.

    *lacking* says that the provider was found to have no `/v1/responses`, and *present* that it has answered there: a 404 is
    about something else then, which a client may have named. *reasoning_field* is the name of the field in
    which it sends its reasoning; empty if it has sent none.
    """

    def __init__(self, settings: settings.Provider) -> None:
        self.apply(settings)
        self.reasoning_field = ""

    def apply(self, settings: settings.Provider) -> None:
        """Use *settings* from now on, and forget what was found out, which may have changed."""
        self._configured = settings.responses
        self.lacking = self.present = False

    @property
    def on(self) -> bool:
        """Whether a response is asked for as a chat completion."""
        return self.lacking or not self._configured
