"""The parameters of a chat completion that a bridge uses, though an engine may not know them, and
the bound of an answer, which must fit into the engine's context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from msgspec import Raw

# Members that an engine may not know.
OPTIONAL = ("reasoning_effort", "parallel_tool_calls", "stream_options", "top_k")
MAX_TOKENS, MAX_COMPLETION_TOKENS = "max_tokens", "max_completion_tokens"
# The name under which a model's context length is learned.
LIMIT = "limit"
# The tokens counted for a picture or a document.
PICTURE_TOKENS = 1600
# The factor by which an estimate is usually exceeded at most; and the tokens that an answer may
# always have, whatever the estimate says.
MARGIN, MIN_ANSWER = 1.1, 1024


class Size(NamedTuple):
    """The size of a request: its bytes without its *pictures*, and the number of these."""

    text_bytes: int
    pictures: int = 0


class AcceptedParameters(NamedTuple):
    """The parameters that a provider accepts: it has *refused* some, and wants its *bound* by one
    name or another.

    *limit*: the tokens of its model's context, and *most* those of an answer, as far as it has
    named them; *left*: the tokens left for the answer of this very request. A byte of a request
    counts for *tokens_per_byte*.
    """

    refused: frozenset[str] = frozenset()
    bound: str = MAX_TOKENS
    limit: int | None = None
    most: int | None = None
    left: int | None = None
    tokens_per_byte: float = 0.25

    def takes(self, word: str) -> bool:
        """Return whether *word* may be sent."""
        return word not in self.refused

    def tokens(self, size: Size) -> int:
        """Return the estimated tokens of a request of this *size*."""
        return max(1, round(size.text_bytes * self.tokens_per_byte)) + (
            size.pictures * PICTURE_TOKENS
        )

    def bounded(self, raw: Raw, size: Size) -> Raw | bytes:
        """Return *raw*, the bound in tokens of the answer to a request of this *size*, lowered to
        the provider's own bound.
        """
        written = bytes(raw)
        known = (self.limit, self.most, self.left) != (None, None, None)
        if not (known and written.isdigit() and len(written) <= 9):
            return raw
        bound = int(written)
        if self.left is not None:
            bound = min(bound, self.left)
        elif self.limit is not None:
            bound = min(bound, max(MIN_ANSWER, self.limit - round(MARGIN * self.tokens(size))))
        if self.most is not None:
            bound = min(bound, self.most)
        return b"%d" % bound


ALL_WORDS = AcceptedParameters()


def optional_in(members: bytes) -> frozenset[str]:
    """Return the optional parameters in *members*, those of a request that are written here."""
    return frozenset(word for word in OPTIONAL if members.find(b'"%b":' % word.encode()) >= 0)
