"""What is moved in a case: tokens on each chip of a mesh, and the experts that they chose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bench.expert_parallel.fit import SHARE_OF_MEMORY
from bench.measure.devices import Devices
from bench.measure.every_chip import over_chips
from bench.one_chip.cases import Case
from bench.one_chip.loads import logits_of, make_load
from moejax import MoEConfig
from pallas_kernels.top_k import top_k_ids


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a case, on the chips of a mesh.

    Attributes:
      config: sizes and precision of the layer.
      mesh: ep chips.
      router: [H, E], which makes the choices.
      topk_ids: int32 [ep · T, K] of all chips.
      x: [ep, T, H].
      ids: int32 [ep, T, K].
      weights: float32 [ep, T, K], random ones that sum to 1 for each token.
    """

    config: MoEConfig
    mesh: Mesh
    router: np.ndarray
    topk_ids: np.ndarray
    x: jax.Array
    ids: jax.Array
    weights: jax.Array

    @classmethod
    def of(cls, case: Case, config: MoEConfig, mesh: Mesh) -> "Tokens":
        """Those of a case with the sizes of `config`, alike in every process."""
        load = make_load(case)
        topk_ids = np.asarray(top_k_ids(logits_of(load), case.k, backend="xla"))
        weights = np.random.default_rng(case.seed).uniform(0.5, 1.5, topk_ids.shape)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        split = (over_chips(values, mesh) for values in (load.x.astype(config.dtype), topk_ids, weights))
        return cls(config, mesh, np.asarray(load.router), topk_ids, *split)


def check_memory(config: MoEConfig, tokens: int, devices: Devices) -> None:
    """Raises ValueError where a CPU, on which every device gets a copy of all rows, cannot hold them.

    Args:
      config: the layer.
      tokens: of each device, at the most.
      devices: those of the run.
    """
    ep = len(devices.devices)
    row = config.hidden_size * jnp.dtype(config.dtype).itemsize
    needed, most = 2 * ep * ep * tokens * config.top_k * row, SHARE_OF_MEMORY * devices.memory_bytes
    if devices.is_virtual and needed > most:
        raise ValueError(
            f"{tokens} tokens on each of {ep} virtual devices need about {needed / 1e9:.0f} GB of the {most / 1e9:.0f} "
            "GB that may be used; lower --tokens or --ep, or raise --reduce"
        )
