"""Which transport carries an exchange out.

A transport is added by its file in this folder and its line in `TRANSPORTS`.
"""

from sharding.exchange import one_chip
from sharding.exchange.dense import Dense
from sharding.exchange.exact import Exact
from sharding.exchange.hierarchical import Hierarchical
from sharding.exchange.transport import Transport
from sharding.exchange.way import AUTO, Way

TRANSPORTS: dict[str, Transport] = {
    "dense": Dense(),
    "ragged": Exact("xla"),
    "remote": Exact("auto"),
    "hierarchical": Hierarchical(outer=Exact("xla"), inner=Dense()),
}
"""Those that carry rows between chips, by name.

In two hops, just the rows that there are travel across nodes, and slabs within one: there an exact exchange would first
lay out a row for every choice of the rows that came, most of which are for other nodes.
"""

DEFAULT = "dense"
"""The one that "auto" takes."""


def pick_transport(way: Way) -> Transport:
    """The transport for `way`.

    It is `one_chip` where experts are not split, whatever is named, and the inner one of two hops where there is but
    one node: a run on few chips then takes the same settings as one on many.
    """
    if way.axes.ep == 1:
        return one_chip
    check_transport(way.transport)
    transport = TRANSPORTS[DEFAULT if way.transport == AUTO else way.transport]
    if isinstance(transport, Hierarchical) and len(way.axes.expert) > 1 and way.axes.size(way.axes.expert[:1]) == 1:
        return transport.inner
    return transport


def on_one_axis() -> list[str]:
    """Those of `TRANSPORTS` that do not need the experts to be split over two axes of the mesh."""
    return [name for name, transport in TRANSPORTS.items() if not isinstance(transport, Hierarchical)]


def check_transport(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a key of `TRANSPORTS`."""
    if name != AUTO and name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {AUTO!r}, {', '.join(map(repr, TRANSPORTS))}, got {name!r}")
