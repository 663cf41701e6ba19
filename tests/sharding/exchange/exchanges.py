"""Exchanges over virtual chips, jitted once for each shape, and what a plain loop says must arrive."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from pallas_kernels.combine import combine
from sharding.exchange import Transport, Way, Wire, exchange, pick_transport
from sharding.exchange.between_chips import BetweenChips
from sharding.exchange.capacity import Scope, count_dropped, limit_to_capacity
from sharding.exchange.pick import FALLBACK
from sharding.exchange.room import slab_and_rounds
from sharding.mesh import make_mesh
from sharding.partition import Partition
from sharding.placement import Placement
from sharding.tokens import Tokens

IN_ROUNDS = ("dense", "ragged")
"""Those that take as many rounds as the load needs. On CPUs "remote" is the same as "ragged"."""
ON_ONE_AXIS = (*IN_ROUNDS, "routed", "gathered")
"""Those that take any mesh, the tests' own too. They add a token's rows in the order of its choices.

"routed" is what "remote" does on GPUs."""
CARRIERS = (*ON_ONE_AXIS, "hierarchical")
"""All transports."""
OTHERS = tuple(name for name in ON_ONE_AXIS if name != FALLBACK)
"""Those of `ON_ONE_AXIS` that no test runs by itself."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of an exchange; `num_tokens` is of one chip, `num_experts` of all.

    Of the transport "hierarchical", `nodes` are the nodes that ep chips are in.
    """

    dp: int
    ep: int
    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int = 8
    capacity_factor: float | None = None
    capacity_of: Scope = "batch"
    wire: Wire | None = None
    transport: str = "auto"
    nodes: int = 2
    slab: int | None = None
    cotangent_dtype: str | None = None

    def __str__(self):
        name = f"dp{self.dp}-ep{self.ep}-T{self.num_tokens}"
        if self.transport == "hierarchical":
            return f"{name}-{self.transport}-{self.nodes}x{self.ep // self.nodes}"
        return name if self.transport == "auto" else f"{name}-{self.transport}"

    @property
    def num_local(self) -> int:
        return self.num_experts // self.ep

    @property
    def slab_and_rounds(self) -> tuple[int, int]:
        return slab_and_rounds((self.num_tokens, self.top_k), self.way)

    @property
    def carrier(self) -> Transport:
        return pick_transport(self.way)

    @property
    def rows_held(self) -> int:
        return self.carrier.rows_held(self.num_tokens, self.top_k, self.way)

    @property
    def mesh(self) -> Mesh:
        if self.transport != "hierarchical":
            return make_mesh(self.ep, self.dp)
        sizes = {"data": self.dp, "node": self.nodes, "expert": self.ep // self.nodes}
        devices = jax.devices()[: self.dp * self.ep]
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 3, devices=devices)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        return ("node", "expert") if self.transport == "hierarchical" else ("expert",)

    @property
    def token_axes(self) -> tuple[str, ...]:
        return ("data", *self.expert_axes)

    @property
    def all_tokens(self) -> int:
        return self.dp * self.ep * self.num_tokens

    @property
    def way(self) -> Way:
        axes = Partition(expert=self.expert_axes).on(self.mesh)
        how = {name: getattr(self, name) for name in ("wire", "transport", "slab", "cotangent_dtype")}
        return Way(Placement(self.num_experts, self.ep), axes, **how)

    def tokens_here(self) -> Tokens:
        """Of the chip that asks."""
        first = jax.lax.axis_index(self.token_axes) * self.num_tokens
        index = first + jnp.arange(self.num_tokens, dtype=jnp.int32)
        return Tokens(index, self.all_tokens, 1, self.token_axes, self.num_tokens)


def over_chips(problem: Problem, function, num_by_expert: int = 0):
    """jit(shard_map(function)). The last arguments are split by expert, the others by token; results stack by chip."""

    def on_chip(*args):
        return jax.tree.map(lambda leaf: leaf[None], function(*args))

    def run(*args):
        split = len(args) - num_by_expert
        by_token, by_expert = PartitionSpec(problem.token_axes), PartitionSpec(problem.expert_axes)
        specs = (by_token,) * split + (by_expert,) * num_by_expert
        return jax.shard_map(on_chip, mesh=problem.mesh, in_specs=specs, out_specs=by_token, check_vma=False)(*args)

    return jax.jit(run)


@functools.cache
def send_and_return(problem: Problem):
    """(x, ids) -> per chip and round: rows that arrived, sizes of their groups; and the sum of all that came back.

    Of a transport that is no `BetweenChips` it is one round, which has to hold everything.
    """
    carrier, way = problem.carrier, problem.way

    def in_rounds(x, ids):
        arrived, sizes, back = [], [], 0
        slab, rounds = problem.slab_and_rounds
        for index in range(rounds):
            plan = carrier.plan_round(carrier.prepare(ids, way), slab, index, way)
            rows = carrier.send(x, plan, way)
            arrived.append(rows)
            sizes.append(plan.group_sizes)
            back += combine(carrier.give_back(rows, plan, way), plan.departure)
        return jnp.stack(arrived), jnp.stack(sizes), back

    def by_stages(x, ids):
        plan = carrier.plan_rows(ids, way)
        rows = carrier.send(x, plan, way)
        slots = carrier.give_back(rows, plan, way)
        ones = jnp.ones(ids.shape, jnp.float32)
        back = carrier.combine_slots(slots, plan, ones, way, preferred_element_type=x.dtype)
        return rows[None], plan.group_sizes[None], back

    return over_chips(problem, in_rounds if isinstance(carrier, BetweenChips) else by_stages)


@functools.cache
def gradient_of_sending(problem: Problem):
    """(x, ids, direction [chips·R, H]) -> rows of the first round, and the gradient of ⟨rows, direction⟩ for x."""

    def on_chip(x, ids, direction):
        plan = problem.carrier.plan_rows(ids, problem.way)
        rows, pullback = jax.vjp(lambda x: problem.carrier.send(x, plan, problem.way), x)
        return rows, pullback(direction)[0]

    return over_chips(problem, on_chip)


def scale_by_expert(factors, rows, group_sizes):
    """Experts that multiply their rows by a number, and leave NaN in the rows of nobody."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows.shape[0])
    expert = jnp.minimum(jnp.searchsorted(ends, row, side="right"), factors.shape[0] - 1)
    scaled = rows * factors[expert][:, None].astype(rows.dtype)
    return jnp.where((row < ends[-1])[:, None], scaled, jnp.nan)


@functools.cache
def apply_experts(problem: Problem):
    """(x, weights, ids, factors [E]) -> Σ_k weights · factors[expert] · x [tokens, H], and drops [chips, E]."""

    def on_chip(x, weights, ids, factors):
        kept, most = ids, None
        if problem.capacity_factor is not None:
            kept, most = limit_to_capacity(
                ids, problem.num_experts, problem.capacity_factor, problem.tokens_here(), problem.capacity_of
            )
        way = dataclasses.replace(problem.way, max_rows=most)
        y = exchange(x, weights, kept, scale_by_expert, factors, way)
        return y, count_dropped(ids, kept, problem.num_experts)

    run = over_chips(problem, on_chip, num_by_expert=1)

    @jax.jit
    def apply(x, weights, ids, factors):
        y, dropped = run(x, weights, ids, factors)
        return y.reshape(x.shape), dropped

    return apply


def groups_that_arrived(arrived, sizes):
    """[chips, rounds, R, H] and [chips, rounds, L] -> for each chip and local expert, its rows of all rounds."""
    arrived, sizes = np.asarray(arrived), np.asarray(sizes)
    chips, rounds, num_local = sizes.shape
    groups = [[[] for _ in range(num_local)] for _ in range(chips)]
    for chip in range(chips):
        for index in range(rounds):
            ends = np.cumsum(sizes[chip, index])
            for expert in range(num_local):
                begin = ends[expert] - sizes[chip, index, expert]
                groups[chip][expert].extend(arrived[chip, index, begin : ends[expert]])
    return groups


def tokens_for(problem: Problem, ids):
    """For each chip and local expert, the tokens that chose it, among those of the chip's row of the mesh."""
    tokens_of_a_row = problem.ep * problem.num_tokens
    wanted = [[[] for _ in range(problem.num_local)] for _ in range(problem.dp * problem.ep)]
    for token, choices in enumerate(np.asarray(ids)):
        for expert in choices:
            if expert >= 0:
                rank, local = divmod(int(expert), problem.num_local)
                wanted[token // tokens_of_a_row * problem.ep + rank][local].append(token)
    return wanted


def inputs(problem: Problem, rng: np.random.Generator, ids=None, **choices):
    """x, weights, `ids` or random ones, and a factor for each expert.

    Whole numbers and halves, so that sums are exact in any order; a choice not made weighs NaN.
    """
    x = rng.integers(-8, 9, (problem.all_tokens, problem.hidden)).astype(np.float32)
    ids = random_ids(problem, rng, **choices) if ids is None else ids
    weights = np.where(ids < 0, np.nan, rng.choice([0.25, 0.5, 1, 2], ids.shape)).astype(np.float32)
    return x, weights, ids, np.arange(1, problem.num_experts + 1, dtype=np.float32)


def expected_sum(x, weights, ids, factors):
    """Σ_k weights · factors[expert] · x."""
    weights, factors = np.asarray(weights, np.float64), np.asarray(factors, np.float64)
    return np.asarray(x, np.float64) * np.where(ids >= 0, weights * factors[ids], 0).sum(1, keepdims=True)


def random_ids(problem: Problem, rng: np.random.Generator, used=None, silent=()) -> np.ndarray:
    """Random choices among the experts `used`, some left out, and none at all on the chips `silent`."""
    used = np.arange(problem.num_experts) if used is None else np.asarray(used, np.int32)
    shape = (problem.all_tokens, problem.top_k)
    if used.size == 0:
        return np.full(shape, -1, np.int32)
    ids = rng.choice(used, shape).astype(np.int32)
    ids[rng.random(shape) < 0.1] = -1
    for chip in silent:
        ids[chip * problem.num_tokens : (chip + 1) * problem.num_tokens] = -1
    return ids
