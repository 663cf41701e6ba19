"""Which transport carries an exchange out.

A transport is added by its file in this folder and its line in `TRANSPORTS`.
"""

from sharding.exchange import one_chip
from sharding.exchange.dense import Dense
from sharding.exchange.exact import Exact
from sharding.exchange.transport import Transport
from sharding.exchange.way import AUTO, Way

TRANSPORTS: dict[str, Transport] = {"dense": Dense(), "ragged": Exact("xla"), "remote": Exact("auto")}
"""Those that carry rows between chips, by name."""

DEFAULT = "dense"
"""The one that "auto" takes."""


def pick_transport(way: Way) -> Transport:
    """The transport for `way`; `one_chip` where experts are not split, whatever is named."""
    if way.axes.ep == 1:
        return one_chip
    check_transport(way.transport)
    return TRANSPORTS[DEFAULT if way.transport == AUTO else way.transport]


def check_transport(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a key of `TRANSPORTS`."""
    if name != AUTO and name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {AUTO!r}, {', '.join(map(repr, TRANSPORTS))}, got {name!r}")
