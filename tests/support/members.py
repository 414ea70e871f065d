"""A server that is an instance of a cluster which a test has made."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aioserver.server.wings import WINGS
from aioserver.wings.cluster.wing import ClusterWing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aioserver.faces.wing import Wing
    from aioserver.wings.cluster.wing import Member


def wings_of(member: Member | None) -> Sequence[Callable[[], Wing]]:
    """All wings, of which that of the cluster has *member*; None: it joins none by itself."""
    if member is None:
        return WINGS
    return [partial(ClusterWing, member) if wing is ClusterWing else wing for wing in WINGS]
