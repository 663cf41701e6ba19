"""Which transport carries an exchange out.

A transport is added by its file in this folder and its line in `TRANSPORTS`.
"""

import functools
import logging
import warnings
from collections.abc import Mapping
from types import MappingProxyType

import jax

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.tracing.target import target_platform
from sharding.exchange import one_chip
from sharding.exchange.dense import Dense
from sharding.exchange.exact import Exact
from sharding.exchange.hierarchical import Hierarchical
from sharding.exchange.transport import Transport
from sharding.exchange.way import AUTO, Way
from sharding.partition import Axes

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

FASTEST: Mapping[str, str] = MappingProxyType({"gpu": "remote", "tpu": "dense", "cpu": "dense"})
"""The one that "auto" takes on a platform, where it can run.

On two H200s, a layer of DeepSeek-V3's sizes takes 1.27 times as long as on one with the same rows by "remote", 1.47 to
1.76 times by "dense" (128 and 4096 tokens a chip), and several times as long by "ragged". TPUs have not been measured.
"""

FALLBACK = "dense"
"""The one that runs anywhere."""

_log = logging.getLogger(__name__)


def pick_transport(way: Way) -> Transport:
    """The transport for `way`.

    It is `one_chip` where experts are not split, whatever is named, and the inner one of two hops where there is but
    one node: a run on few chips then takes the same settings as one on many.

    Raises:
      ValueError: `way.transport` is no name of one, or names one that cannot run here.
    """
    if way.axes.ep == 1:
        return one_chip
    check_transport(way.transport)
    transport = TRANSPORTS[_fastest(way.axes) if way.transport == AUTO else way.transport]
    if way.transport == "remote" and (reason := _why_not_remote(way.axes)):
        raise ValueError(f"transport 'remote' {reason}; use transport='auto', or 'dense'")
    if isinstance(transport, Hierarchical) and len(way.axes.expert) > 1 and way.axes.size(way.axes.expert[:1]) == 1:
        return transport.inner
    return transport


def _fastest(axes: Axes) -> str:
    """What "auto" stands for."""
    name, platform = FASTEST[target_platform()], target_platform()
    reason = _why_not_remote(axes) if name == "remote" else None
    _say_once(FALLBACK if reason else name, platform, reason)
    return FALLBACK if reason else name


def _why_not_remote(axes: Axes) -> str | None:
    """What keeps the GPUs of a mesh from storing into each other's memory, None if nothing does."""
    if target_platform() != "gpu":
        return None
    if jax.process_count() > 1:
        return f"needs GPUs of one process, and {jax.process_count()} take part"
    try:
        require_hopper("all_to_all")
    except Unsupported as error:
        return f"cannot run: {error}"
    if axes.in_order is False:
        return "needs a mesh of the devices 0, 1, 2, … in this order, its last axis fastest, and this one has another"
    return None


@functools.cache
def _say_once(name: str, platform: str, reason: str | None) -> None:
    _log.info("exchange: transport %r on %s", name, platform)
    if reason:
        warnings.warn(f"exchange: transport {name!r}, as 'remote' {reason}", stacklevel=2)


def on_one_axis() -> list[str]:
    """Those of `TRANSPORTS` that do not need the experts to be split over two axes of the mesh."""
    return [name for name, transport in TRANSPORTS.items() if not isinstance(transport, Hierarchical)]


def check_transport(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a key of `TRANSPORTS`."""
    if name != AUTO and name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {AUTO!r}, {', '.join(map(repr, TRANSPORTS))}, got {name!r}")
