"""What is moved in a case: tokens on each chip of a mesh, and a load that says to which experts they go."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bench.exchange.measure import Tokens
from bench.expert_parallel.fit import SHARE_OF_MEMORY
from bench.measure.devices import Devices
from bench.one_chip.cases import Case
from bench.one_chip.loads import logits_of, make_load
from moejax import MoEConfig
from pallas_kernels.top_k import top_k_ids


def case_of(config: MoEConfig, tokens: int, **load: Any) -> Case:
    """The load of a layer with so many tokens over all chips; the rest are fields of `Case`.

    Raises:
      ValueError: its sizes make no sense.
    """
    experts, k, hidden = config.num_experts, config.top_k, config.hidden_size
    return Case("topk", tokens=tokens, experts=experts, k=k, hidden=hidden, **load)


def make_tokens(case: Case, config: MoEConfig, mesh: Mesh) -> tuple[Tokens, np.ndarray]:
    """The tokens of a case with their choices, alike in every process; and the router [H, E] that makes these."""
    load = make_load(case)
    topk_ids = np.asarray(top_k_ids(logits_of(load), case.k, backend="xla"))
    return Tokens.of(load.x.astype(config.dtype), topk_ids, config, mesh, case.seed), np.asarray(load.router)


def check_memory(config: MoEConfig, tokens: int, devices: Devices) -> None:
    """Raises ValueError where a CPU, on which every device gets a copy of all rows, cannot hold them.

    Args:
      config: the layer.
      tokens: of each device, at the most.
      devices: those of the run.
    """
    ep = len(devices.devices)
    row = config.hidden_size * jax.numpy.dtype(config.dtype).itemsize
    needed, most = 2 * ep * ep * tokens * config.top_k * row, SHARE_OF_MEMORY * devices.memory_bytes
    if devices.is_virtual and needed > most:
        raise ValueError(
            f"{tokens} tokens on each of {ep} virtual devices need about {needed / 1e9:.0f} GB of the {most / 1e9:.0f} "
            "GB that may be used; lower --tokens or --ep, or raise --reduce"
        )
