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
from pallas_kernels.tracing.target import target_chip, target_platform
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

PREFERRED: Mapping[str, str] = MappingProxyType({"gpu": "remote"})
"""What "auto" takes on a platform, where it can run; `FALLBACK` elsewhere.

Over two H200s a layer of DeepSeek-V3 takes 1.22 and 1.27 times as long as on one by "remote", with 128 and with 4096
tokens a chip, 1.44 and 1.75 times by "dense", and several times by "ragged". On TPUs nothing has been measured.
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
    transport = TRANSPORTS[transport_name(way)]
    if way.transport == "remote" and (reason := _why_not_remote(way.axes)):
        raise ValueError(f"transport 'remote' {reason}; use transport='auto', 'dense' or 'ragged'")
    if isinstance(transport, Hierarchical) and len(way.axes.expert) > 1 and way.axes.size(way.axes.expert[:1]) == 1:
        return transport.inner
    return transport


def transport_name(way: Way) -> str:
    """`way.transport`, or what "auto" stands for here; between chips, that is, where experts are split."""
    return _automatic(way.axes) if way.transport == AUTO else way.transport


def _automatic(axes: Axes) -> str:
    """The name that "auto" stands for."""
    platform = target_platform()
    name = PREFERRED.get(platform, FALLBACK)
    reason = _why_not_remote(axes) if name == "remote" else None
    name = FALLBACK if reason else name
    _report_once(name, platform, reason)
    return name


def _why_not_remote(axes: Axes) -> str | None:
    """What keeps the GPUs of a mesh from storing into each other's memory, None if nothing does.

    Where `jax.jit` hides the devices of a mesh, it is taken to have all devices in their order if it has as many.
    """
    if target_platform() != "gpu":
        return None
    if (processes := jax.process_count()) > 1:
        return f"needs all GPUs in one process, and there are {processes} processes"
    try:
        require_hopper("all_to_all")
    except Unsupported as error:
        return f"cannot run: {error}"
    mesh, is_hidden = jax.sharding.get_abstract_mesh(), target_chip() is None and axes.in_order is None
    if axes.in_order is False or (is_hidden and not mesh.empty and mesh.size != jax.device_count()):
        return "needs a mesh of the devices 0, 1, 2, … in this order, the last axis counting fastest"
    return None


@functools.cache
def _report_once(name: str, platform: str, reason: str | None) -> None:
    _log.info("exchange: transport %r on %s", name, platform)
    if reason:
        warnings.warn(f"exchange: transport {name!r}, as 'remote' {reason}", stacklevel=1)


def on_one_axis() -> list[str]:
    """Those of `TRANSPORTS` that do not need the experts to be split over two axes of the mesh."""
    return [name for name, transport in TRANSPORTS.items() if not isinstance(transport, Hierarchical)]


def check_transport(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a key of `TRANSPORTS`."""
    if name != AUTO and name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {AUTO!r}, {', '.join(map(repr, TRANSPORTS))}, got {name!r}")
