"""The seam of a continued answer: the point at which the rest of a broken text begins.

When an answer broke off after some text, its *transcript*, another answer is asked for the rest.
Its text is checked before any of it is shown:

    Onward     an engine that was given the text as the beginning of its own message continues it.
               One fault can be noticed: the engine begins anew. Then the whole transcript must
               come again, word for word, and is dropped
    Anchored   a model that was asked to write the last words again, the *anchor*, and to go on.
               They must come, and are dropped

Nothing else is ever cut off. To match a few characters at the seam would lose text of a correct
engine, since texts repeat themselves ("ha ha", tables, zeros, code).

An engine has begun anew if its text begins with the first 32 characters of the transcript. That
proves something only if these occur nowhere else, not even across the seam: in the transcript
followed by themselves they occur at the two ends alone. Otherwise a text that repeats itself would
be mistaken for a new beginning. Only a text that repeats its own whole beginning exactly at the cut
is misjudged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

# Characters by which a text that begins anew is recognized.
BEGINNING = 32
# The most characters of an anchor.
ANCHOR = 64
# The most characters that are held back before the seam is found, or is not.
MAX_CHECKED = 1 << 16
# The brackets around the anchor in the request to a model.
OPENING, CLOSING = "⟦", "⟧"


class SeamBroken(ValueError):
    """The text is not the rest of the transcript."""


class Seam(ABC):
    """Lets the rest of a text pass, once it is proved to be the rest.

    Always: the results of `feed` and `close` are the rest of the transcript, in order; if either
    has raised, nothing was returned before.
    """

    # Whether the rest is proved: all later text passes.
    found = False

    @abstractmethod
    def feed(self, text: str) -> str:
        """Return the part of *text*, which has come next, and of the text held back, that may
        pass.

        Raises:
            SeamBroken: the text is not the rest.
        """

    @abstractmethod
    def close(self) -> str:
        """Return the text held back, since no text follows, or something else comes first.

        Raises:
            SeamBroken: the text is not the rest.
        """


class Onward(Seam):
    """The seam of an engine that goes on with *transcript* as its own message.

    *repeats*: the engine is known to write *transcript* again before the rest.
    """

    def __init__(self, transcript: str, *, repeats: bool = False) -> None:
        self._transcript = transcript
        self.found = not (repeats or provable(transcript))
        self._held = ""
        # The number of characters that have come, all of them equal to *transcript*.
        self._matched = 0
        # Whether the engine has begun anew; None: not known yet.
        self.repeated: bool | None = None

    def feed(self, text: str) -> str:
        """Return the text that may pass, as `Seam.feed`."""
        if self.found or not text:
            return text
        transcript, matched = self._transcript, self._matched
        size = min(len(text), len(transcript) - matched)
        if not transcript.startswith(text[:size], matched):
            if matched + _common(transcript, matched, text) >= BEGINNING:
                raise SeamBroken("the answer begins anew, and says something else")
            self.found, self.repeated = True, False
            held, self._held = self._held, ""
            return held + text
        self._matched = matched = matched + size
        if matched == len(transcript):
            self.found = self.repeated = True
            self._held = ""
            return text[size:]
        if matched > MAX_CHECKED:
            raise SeamBroken(f"more than {MAX_CHECKED} characters are repeated")
        # A text that begins anew is never shown.
        self._held = self._held + text if matched < BEGINNING else ""
        return ""

    def close(self) -> str:
        """Return the text held back, as `Seam.close`."""
        if self.found:
            return ""
        if self._matched >= BEGINNING:
            raise SeamBroken("the answer begins anew, and ends too early")
        self.found = True
        held, self._held = self._held, ""
        return held


class Anchored(Seam):
    """The seam of a model that was asked to write *anchor* again, and to go on."""

    def __init__(self, anchor: str) -> None:
        self._anchor = anchor
        self._held = ""

    def feed(self, text: str) -> str:
        """Return the text that may pass, as `Seam.feed`."""
        if self.found:
            return text
        self._held += text
        held, anchor = self._held.lstrip(), self._anchor
        if not anchor.startswith(held[: len(anchor)]):
            raise SeamBroken("the answer does not begin with the last words")
        if len(held) >= len(anchor):
            self.found, self._held = True, ""
            return held[len(anchor) :]
        if len(self._held) > MAX_CHECKED:
            raise SeamBroken("the answer begins with white space only")
        return ""

    def close(self) -> str:
        """Return nothing, as `Seam.close`: the anchor has come, or there is no rest."""
        if not self.found:
            raise SeamBroken("the answer ends before the last words are there")
        return ""


def provable(transcript: str) -> bool:
    """Return whether a text that begins like *transcript*, and follows it, must begin it anew."""
    beginning = transcript[:BEGINNING]
    return len(transcript) >= BEGINNING and (transcript + beginning).find(beginning, 1) == len(
        transcript
    )


def anchor_of(transcript: str) -> str:
    """Return the last words of *transcript*, by which the seam is found; "" if there are none."""
    anchor = transcript[-ANCHOR:]
    if len(transcript) > ANCHOR and not (transcript[-ANCHOR - 1].isspace() or anchor[0].isspace()):
        # It begins within a word.
        head, space, words = _at_space(anchor)
        anchor = words if space and words.strip() else head + space + words
    anchor = anchor.lstrip()
    return "" if OPENING in anchor or CLOSING in anchor else anchor


def _at_space(text: str) -> tuple[str, str, str]:
    """Return *text* before its first white space, the white space, and the text after it."""
    place = next((place for place, each in enumerate(text) if each.isspace()), len(text))
    return text[:place], text[place : place + 1], text[place + 1 :]


def _common(transcript: str, start: int, text: str) -> int:
    """Return how many characters of *text* equal those of *transcript* from *start* on."""
    count = 0
    for ours, theirs in zip(transcript[start:], text, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
