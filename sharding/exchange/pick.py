"""Which transport carries an exchange out: the one that is named, or by rules that were measured.

A transport is a module of this folder. It is added by its file and its line in `TRANSPORTS`; a line in `RULES` says
where "auto" takes it.
"""

import dataclasses

from sharding.exchange import dense, one_chip
from sharding.exchange.way import AUTO, Transport, Way

TRANSPORTS: dict[str, Transport] = {"dense": dense}
"""Those that carry rows between chips, by name."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a transport is the fastest.

    Attributes:
      transport: a name in `TRANSPORTS`.
      ep: the largest expert-parallel group that this was measured for; None for any.
    """

    transport: str
    ep: int | None = None


RULES: tuple[Rule, ...] = (Rule("dense"),)
"""The first that fits is taken."""


def pick_transport(way: Way) -> Transport:
    """The transport for `way`: where experts are not split, none of `TRANSPORTS` is needed, whatever is named."""
    if way.axes.ep == 1:
        return one_chip
    check_transport(way.transport)
    if way.transport != AUTO:
        return TRANSPORTS[way.transport]
    return TRANSPORTS[next(rule.transport for rule in RULES if rule.ep is None or way.axes.ep <= rule.ep)]


def check_transport(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a key of `TRANSPORTS`."""
    if name != AUTO and name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {AUTO!r}, {', '.join(map(repr, TRANSPORTS))}, got {name!r}")
