"""Finds the end of a call's arguments, one JSON object (RFC 8259) that comes in pieces."""

from __future__ import annotations

import re

from aioserver.protocol.openai import BadEvent

_IN_STRING, _OUTSIDE = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')
_SPACE = " \t\r\n"


class Scanner:
    """Looks for the end of an object whose text comes in pieces.

    It reads only brackets, strings and escapes, and leaves everything between them to the client.
    Its work is linear in the text.
    """

    __slots__ = ("_depth", "_escaped", "_string", "begun")

    def __init__(self) -> None:
        # Whether anything but white space has come.
        self.begun = False
        self._depth = 0
        # Whether the text so far ends within a string, and there behind a backslash.
        self._string = self._escaped = False

    def end(self, text: str) -> int:
        """Return the index behind the end of the object in *text*, the next piece; -1 if the object
        does not end there.

        Raises:
            BadEvent: the text is not an object.
        """
        if not self.begun:
            first = text.lstrip(_SPACE)[:1]
            if not first:
                return -1
            if first != "{":
                raise BadEvent("the arguments of a call are no object")
            self.begun = True
        place, size = 0, len(text)
        if self._escaped and size:
            place, self._escaped = 1, False
        while place < size:
            match = (_IN_STRING if self._string else _OUTSIDE).search(text, place)
            if match is None:
                return -1
            place = match.end()
            mark = match[0]
            if mark == '"':
                self._string = not self._string
            elif mark == "\\":
                self._escaped = place == size
                place += 1
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return place
        return -1
