"""The full-size layer as a programme to compile for a slice: shapes and shardings, no numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from bench.fit import reduce_width
from bench.tpu.tpu_slices import Slice, parse_slice
from moejax import MoEConfig, MoEParams, get_preset, moe, params_spec
from moejax.experts import EXPERT_WEIGHTS, param_shapes
from pallas_kernels.quantize import QDtype, QTensor, scale_shape
from sharding.exchange_plan import local_experts
from sharding.mesh import DATA_AXIS, EXPERT_AXIS, make_mesh, tokens_spec


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
    precision: str = "w8a8"
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
        local_experts(config.num_experts, self.ep)
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

    def program(self, devices: Sequence[jax.Device]) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function over `devices`, the slice's, and the shapes of its arguments."""
        config = self.config()
        mesh = make_mesh(self.ep, self.dp, devices=devices)
        x = jax.ShapeDtypeStruct(
            (self.batch, config.hidden_size),
            config.dtype,
            sharding=NamedSharding(mesh, tokens_spec((DATA_AXIS, EXPERT_AXIS))),
        )
        params = abstract_params(config, mesh, training=self.grad)

        def forward(x: jax.Array, params: MoEParams) -> Any:
            return moe(x, params, config, mesh=mesh)

        def loss(x: jax.Array, params: MoEParams) -> jax.Array:
            y, aux = forward(x, params)
            return jnp.square(y.astype(jnp.float32)).mean() + aux.loss

        if not self.grad:
            return jax.jit(forward), (x, params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (x, params))
        return jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=shardings), (x, params)


def abstract_params(config: MoEConfig, mesh: Mesh, *, training: bool) -> MoEParams:
    """Shapes, dtypes and shardings of the parameters on `mesh`.

    In training they are all in config.param_dtype; for serving the experts' weights are in config.dtype, or in 8 bits.
    """
    shapes = vars(param_shapes(config))
    specs = vars(params_spec(MoEParams(**{name: shape and 0 for name, shape in shapes.items()})))
    params: Mapping[str, Any] = {
        name: None if shape is None else _abstract(name, shape, config, NamedSharding(mesh, specs[name]), training)
        for name, shape in shapes.items()
    }
    return MoEParams(**params)


def _abstract(name: str, shape: tuple[int, ...], config: MoEConfig, sharding: NamedSharding, training: bool) -> Any:
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if training or name not in EXPERT_WEIGHTS:
        return array(shape, config.param_dtype)
    if config.precision == "w16a16":
        return array(shape, config.dtype)
    q = config.quantization
    scales = scale_shape(shape, q.rhs_scaling)
    transposed = [(*sizes[:-2], sizes[-1], sizes[-2]) for sizes in (shape, scales)]
    return QTensor(array(transposed[0], jnp.dtype(q.dtype)), array(transposed[1], jnp.float32))
