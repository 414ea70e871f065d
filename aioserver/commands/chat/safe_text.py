"""Text of a model or a server, as it may be sent to a terminal: ECMA-48 control functions are taken out.

A terminal obeys what follows an ESC or a C1 control character: it can be made to lie about what it shows, to set its title,
and some terminals to type. Bidirectional overrides (UAX #9) show a text in another order than it has.
"""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL, C1; line and paragraph separator, bidirectional embeddings, overrides and isolates; halves of
# a surrogate pair, which no encoding has.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
REPLACEMENT = "\ufffd"


def safe(text: str) -> str:
    """Return *text* without characters that a terminal obeys; each is a replacement character.

    Lines end with LF: a carriage return, which lets a terminal write over its line, is taken out.
    """
    return _UNSAFE.sub(REPLACEMENT, text.replace("\r", ""))
