"""The layer as a flax.nnx module."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.aux_output import MoEAux
from moejax.axes import axes_on, partition_by_rules
from moejax.checks import check_config
from moejax.config import MoEConfig
from moejax.functional import moe
from moejax.initial import Initializer, initial
from moejax.param import Param
from moejax.params import EXPERT_FIELDS, MoEParams, check_params, operand_spec, param_table, quantize_params
from moejax.placing import place
from moejax.rounded_experts import RoundedExperts, quantize_for_training
from pallas_kernels.quantize import QTensor
from sharding.mesh import AnyMesh, mesh_at_call, mesh_here
from sharding.partition import Axes, Partition

_LECUN = nnx.initializers.lecun_normal()
_ZEROS = nnx.initializers.zeros


class RouterState(nnx.Variable):
    """Router state that no gradient trains: the correction bias of loss-free balancing, the table of hash routing."""


class QuantizedParam(nnx.Variable):
    """A weight in 8 bits, a QTensor, which takes no gradient."""


class PlacedParam(nnx.Variable):
    """A parameter of the experts of a placed layer, which takes no gradient: replicas would drift apart."""


class ExpertSlots(nnx.Variable):
    """Which slots hold which expert, where hot ones have several; see `moejax.place`."""


class RouterParams(nnx.Module):
    """The parameters of a layer's router, each an attribute: `layer.router.kernel`, also `layer.router["kernel"]`."""

    def __init__(self, variables: dict[str, nnx.Variable[Any]]):
        for name, variable in variables.items():
            setattr(self, name, variable)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> nnx.Variable[Any]: ...

    def __getitem__(self, name: str) -> nnx.Variable[Any]:
        if name not in set(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in vars(self).items() if isinstance(value, nnx.Variable))


class MoE(nnx.Module):
    """A Mixture-of-Experts feed-forward layer.

        layer = MoE(get_preset("mixtral-8x7b"), rngs=nnx.Rngs(0))
        y, aux = layer(x)                  # x [batch, sequence, hidden]
        loss = task_loss(y) + aux.loss
        ...
        layer.update(aux)                  # after the step: adjusts what no gradient trains

    Created under `jax.set_mesh(mesh)`, or with `mesh=`, its parameters carry their sharding, each chip makes its own
    share of them, and calls are spread over the mesh, within `jax.set_mesh` or not; without a mesh everything stays on
    one chip.

    Attributes:
      config: the layer's MoEConfig.
      router: the router's parameters, `RouterParams` of nnx.Param and RouterState.
      gate_up, down, …: nnx.Param of the shapes that `MoEParams` states, QuantizedParam in a layer in 8 bits; None where
        the configuration has no such parameter.
      deterministic: whether a noisy router adds no noise; `train()` and `eval()` set it.
      noise: the stream "router" of random numbers, if the router is noisy.
    """

    gate_up: nnx.Variable[Any]
    down: nnx.Variable[Any]
    gate_up_bias: nnx.Variable[Any] | None
    down_bias: nnx.Variable[Any] | None
    shared_gate_up: nnx.Variable[Any] | None
    shared_down: nnx.Variable[Any] | None
    shared_gate: nnx.Variable[Any] | None
    noise: nnx.RngStream | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        rngs: nnx.Rngs | None = None,
        mesh: Mesh | None = None,
        partition: Partition | None = None,
        kernel_init: Initializer = _LECUN,
        bias_init: Initializer = _ZEROS,
        router_init: Initializer = _LECUN,
        deterministic: bool = False,
        params: MoEParams | None = None,
    ):
        """Makes the parameters.

        Args:
          config: the layer.
          rngs: the stream "params" initialises the parameters, the stream "router" gives a noisy router its noise.
          mesh: the default is the mesh of `jax.set_mesh`, if any: that in force at a call, else that in force here.
          partition: which axes of the mesh split what; default is what flax's logical axis rules say, if any are in
            force here, else at a call, else `Partition()`.
          kernel_init: initialises each matrix [in, out] of each expert, gate and up separately.
          bias_init: initialises all biases.
          router_init: initialises the router's kernels, except those that the router initialises itself.
          deterministic: whether a noisy router is quiet.
          params: values to take instead of new ones; see `from_params`.

        Raises:
          ValueError: the mesh lacks an axis or would repeat work, or a size does not divide.
        """
        check_config(config)
        self.config = config
        self.mesh = mesh
        self.partition = partition_by_rules() if partition is None else partition
        self.deterministic = deterministic
        here = mesh_here(mesh)
        self._made_on = here if mesh is None else None
        if params is not None:
            check_params(params, config)
        num_slots = None if params is None else params.num_slots
        axes = None if here is None else axes_on(here, partition, config, num_slots=num_slots)
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")
        initializers = {"kernel": kernel_init, "bias": bias_init, "router kernel": router_init}
        make = functools.partial(
            _variable, config=config, rngs=rngs, mesh=here, axes=axes, metadata_mesh=mesh, initializers=initializers
        )
        replicas = None if params is None else params.replicas
        table = param_table(config)
        for field in dataclasses.fields(table):
            if field.name not in ("router", "replicas"):
                row = getattr(table, field.name)
                value = None if params is None else getattr(params, field.name)
                kind = nnx.Param if replicas is None or field.name not in EXPERT_FIELDS else PlacedParam
                setattr(self, field.name, None if row is None else make(row, value, kind=kind))
        self.replicas = None if replicas is None else ExpertSlots(_on_every_chip(replicas, here))
        given = {} if params is None else params.router or {}
        self.router = RouterParams({name: make(row, given.get(name)) for name, row in (table.router or {}).items()})
        noise = None
        if config.router.noisy and rngs is not None and ("router" in rngs or "default" in rngs):
            noise = rngs.router.fork()
        self.noise = nnx.data(noise)  # where there is none, `quantized` may set one

    @classmethod
    def from_params(cls, params: MoEParams, config: MoEConfig, **settings: Any) -> Self:
        """The layer with these parameters, which may be in 8 bits.

        Args:
          params: see `MoEParams`. They keep their dtype, whatever `config.param_dtype` says of new ones.
          config: the layer.
          **settings: those of the constructor, such as `mesh`.

        Raises:
          ValueError: the parameters are not those of the configuration.
        """
        return cls(config, params=params, **settings)

    def params(self) -> MoEParams:
        """The parameters as arrays, for `moejax.moe`."""
        names = [field.name for field in dataclasses.fields(MoEParams) if field.name != "router"]
        values = {name: getattr(self, name) for name in names}
        return MoEParams(
            self._of_router(), **{name: None if v is None else v.get_value() for name, v in values.items()}
        )

    def quantized(self) -> Self:
        """The same layer for serving in 8 bits: the weights of its experts are rounded; see `quantize_params`."""
        return self._with(quantize_params(self.params(), self.config))

    def quantized_for_training(self) -> RoundedExperts:
        """The weights of the experts in 8 bits, for several calls before an update: `layer(x, rounded=...)`.

        See `moejax.quantize_for_training`.
        """
        return quantize_for_training(self.params(), self.config, mesh=self.mesh_at_call(), partition=self.partition)

    def placed(self, experts: Any) -> Self:
        """The same layer for serving with its experts in other slots, hot ones in several; see `moejax.place`.

        Its experts' parameters are PlacedParam, which no optimizer of nnx.Param trains, and its slots ExpertSlots: save
        both.
        """
        return self._with(place(self.params(), experts))

    def _with(self, params: MoEParams) -> Self:
        settings = {"mesh": self.mesh, "partition": self.partition, "deterministic": self.deterministic}
        layer = type(self).from_params(params, self.config, **settings)
        layer.noise, layer._made_on = self.noise, self._made_on
        return layer

    def __call__(
        self,
        x: jax.Array,
        *,
        residual: jax.Array | None = None,
        mask: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        topk_ids: jax.Array | None = None,
        rounded: RoundedExperts | None = None,
        train: bool | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Sends every token through the experts that the router gives it.

        Args:
          x: [..., H], BF16, FP16 or float32; the last dimension before H is the sequence.
          residual: of the shape of x, what y is added to; None for nothing.
          mask: bool [...], true for real tokens; None if all are.
          token_ids: integer [...], for routers that go by them.
          topk_ids: integer [..., K], choices to repeat, −1 where the router is to choose.
          rounded: what `quantized_for_training` gave for the parameters as they are now, and placed as they are; None
            rounds them in this call.
          train: whether a noisy router adds its noise; None for what `deterministic` says.

        Returns:
          y [..., H] in the dtype of `x`, and MoEAux. See `moejax.moe`.

        Raises:
          ValueError: shapes or dtypes do not fit, or `x` is known and holds NaN.
        """
        is_noisy = self.config.router.noisy and (not self.deterministic if train is None else train)
        if is_noisy and self.noise is None:
            raise ValueError(
                "a layer with a noisy router needs random numbers to train: make it with rngs=nnx.Rngs(router=0, …), "
                'or in linen call apply(…, rngs={"router": key})'
            )
        return moe(
            x,
            self.params(),
            self.config,
            residual=residual,
            mask=mask,
            token_ids=token_ids,
            topk_ids=topk_ids,
            rounded=rounded,
            key=self.noise() if is_noisy and self.noise is not None else None,
            mesh=self.mesh_at_call(),
            partition=self.partition,
        )

    def mesh_at_call(self) -> AnyMesh | None:
        """The mesh that was given; else None for the one in force, or where there is none, that of the constructor."""
        return mesh_at_call(self.mesh, self._made_on, "a layer")

    def update(self, aux: MoEAux) -> None:
        """Adjusts what no gradient trains, by the aux of a step. Call it after each step, outside of the gradient.

        Raises:
          ValueError: `aux` is not what one step of this layer says.
        """
        if not isinstance(aux, MoEAux):
            raise ValueError(f"aux must be the MoEAux that a call of the layer returns, got {type(aux).__name__}")
        load, stacked = aux.load.tokens_per_expert, self.down.get_value().shape[:-3]
        if load.shape != (*stacked, self.config.num_experts):
            raise ValueError(
                f"aux.load.tokens_per_expert must be {[*stacked, self.config.num_experts]}, the load of one step, got "
                f"{list(load.shape)}; of several steps, add up: jax.tree.map(lambda leaf: leaf.sum(0), aux)"
            )
        for name, value in self.config.router.update(self._of_router(), load).items():
            self.router[name].set_value(value)

    def _of_router(self) -> dict[str, jax.Array]:
        return {name: self.router[name].get_value() for name in self.router}

    @property
    def causal(self) -> bool:
        """Whether the output of a token never depends on later tokens.

        Where experts have a capacity, first choices of later tokens displace second choices of earlier ones.
        """
        has_order = self.config.capacity_factor is None or self.config.top_k == 1
        return has_order and self.config.router.causal


def _variable(
    row: Param,
    value: Any,
    *,
    config: MoEConfig,
    rngs: nnx.Rngs | None,
    mesh: AnyMesh | None,
    axes: Axes | None,
    metadata_mesh: Mesh | None,
    initializers: dict[str, Initializer],
    kind: type[nnx.Variable[Any]] = nnx.Param,
) -> nnx.Variable[Any]:
    """The variable of one parameter: `value`, or its initial value, where the mesh wants it."""
    kind = RouterState if row.kind == "state" else QuantizedParam if isinstance(value, QTensor) else kind
    spec = None if axes is None else operand_spec(row, value, axes)
    if value is None:
        if rngs is None:
            raise ValueError("rngs must be given, such as nnx.Rngs(0); from_params takes parameters that there are")
        # State begins the same whatever the seed.
        key = jax.random.key(0) if row.kind == "state" else rngs.params()
        value = initial(row, initializers.get(row.kind, _ZEROS), config.param_dtype, key, mesh, spec)
    else:
        value = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), value)
        if mesh is not None:
            value = jax.tree.map(lambda leaf, own: _placed(leaf, mesh, own), value, spec)
    if spec is None or isinstance(value, QTensor):
        return kind(value)
    return kind(value, out_sharding=tuple(spec), mesh=metadata_mesh)


def _on_every_chip(tree: Any, mesh: AnyMesh | None) -> Any:
    return tree if mesh is None else jax.tree.map(lambda leaf: _placed(leaf, mesh, PartitionSpec()), tree)


def _placed(x: jax.Array, mesh: AnyMesh, spec: Any) -> jax.Array:
    if isinstance(x, jax.core.Tracer) or not isinstance(mesh, Mesh):
        return x
    return jax.device_put(x, NamedSharding(mesh, spec))
