"""The full-size layer as a programme to compile for a slice: shapes and shardings, no numbers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.expert_parallel.fit import reduce_width
from bench.tpu.slices import Slice, parse_slice
from moejax import MoEConfig, MoEParams, get_preset, moe, param_specs, quantize_params
from moejax.config import Precision
from moejax.functional import axes_on
from moejax.param import Param
from moejax.params import map_table
from pallas_kernels.quantize import QDtype
from sharding.mesh import make_mesh
from sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class LayerJob:
    """What to compile. Its fields, as a dictionary, are the job of `bench.tpu.aot_worker`.

    Attributes:
      topology: the slice, such as "v6e:4x8".
      model: a preset.
      ep: devices that share one set of experts.
      batch: tokens over the whole slice.
      precision: "w8a8" or "w16a16".
      weights: 8-bit dtype of "w8a8": "float8_e4m3fn", "float8_e5m2" or "int8".
      grad: the gradients of the parameters and of the input too.
      backend: of every operator.
      reduce: divide the widths by this.
    """

    topology: str
    model: str
    ep: int
    batch: int
    precision: Precision = "w8a8"
    weights: QDtype = "int8"
    grad: bool = False
    backend: str = "auto"
    reduce: int = 1

    @property
    def slice(self) -> Slice:
        """The slice that `topology` names."""
        return parse_slice(self.topology)

    @property
    def dp(self) -> int:
        """Sets of experts on the slice."""
        return self.slice.num_devices // self.ep

    def config(self) -> MoEConfig:
        """The layer.

        Raises:
          ValueError: ep divides neither the experts nor the slice, or the model or a setting is unknown.
        """
        config = get_preset(self.model, precision=self.precision, backend=self.backend)
        config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, dtype=self.weights))
        Placement(config.num_experts, self.ep)  # raises where they do not fit
        devices = self.slice.num_devices
        if devices % self.ep:
            fitting = [n for n in range(1, devices + 1) if devices % n == 0 and config.num_experts % n == 0]
            raise ValueError(
                f"ep={self.ep} does not fit {self.topology}: it has {devices} devices, which must be a multiple of ep; "
                f"choose ep among {', '.join(map(str, fitting))}"
            )
        if self.batch < 1 or self.batch % devices:
            raise ValueError(
                f"batch must be a positive multiple of the {devices} devices of {self.topology}, got {self.batch}"
            )
        return reduce_width(config, self.reduce)

    def program(self) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function over the slice's devices, and the shapes of its arguments."""
        config = self.config()
        mesh = make_mesh(self.ep, self.dp, devices=self.slice.devices)
        tokens = NamedSharding(mesh, PartitionSpec(axes_on(mesh, None, config).tokens))
        x = jax.ShapeDtypeStruct((self.batch, config.hidden_size), config.dtype, sharding=tokens)
        params = abstract_params(config, mesh, training=self.grad)

        forward = functools.partial(moe, config=config, mesh=mesh)
        if not self.grad:
            return jax.jit(forward), (x, params)

        def loss(x: jax.Array, params: MoEParams) -> jax.Array:
            y, aux = forward(x, params)
            return jnp.square(y.astype(jnp.float32)).mean() + aux.loss

        shardings = jax.tree.map(lambda leaf: leaf.sharding, (x, params))
        return jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings), (x, params)


def abstract_params(config: MoEConfig, mesh: Mesh, *, training: bool) -> MoEParams:
    """Shapes, dtypes and shardings of the parameters on `mesh`.

    In training they are all in config.param_dtype; for serving the experts' weights are in config.dtype, or in 8 bits.
    """

    def abstract(row: Param) -> jax.ShapeDtypeStruct:
        is_served = row.kind == "kernel" and not training
        return jax.ShapeDtypeStruct(row.shape, config.dtype if is_served else config.param_dtype)

    params = map_table(abstract, config)
    if config.precision == "w8a8" and not training:
        params = jax.eval_shape(functools.partial(quantize_params, config=config), params)
    specs = param_specs(params, config, axes_on(mesh, None, config))

    def placed(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, params, specs)
