"""How the doors are plugged in."""

from __future__ import annotations

from typing import ClassVar

from aioserver.faces.wing import Wing


class DoorsWing(Wing):
    """What stops people at the door, beside keys."""

    name: ClassVar = "doors"
