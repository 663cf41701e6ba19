"""The all-to-all by stores into peers' memory: on as many GPUs as there are, two or more; lowered on none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.all_to_all import Blocks
from pallas_kernels.all_to_all.gpu.move import targets
from pallas_kernels.quantize import dequantize, quantize
from tests.helpers import normal, same_bits
from tests.pallas_kernels.all_to_all.moves import (
    FOUR,
    OTHER_AXES,
    Mesh,
    blocks_of,
    by_routes_and_back,
    check,
    check_tokens,
    loads,
    moving,
    random_sizes,
    routes_of,
    tables,
    tokens_for,
)
from tests.pallas_kernels.kernels_gpu import lower_for_cuda

BACKEND = "pallas_gpu"


@pytest.fixture(scope="module")
def mesh():
    chips = jax.device_count()
    if chips < 2:
        pytest.skip("needs two GPUs or more")
    return Mesh((chips,), ("expert",), ("expert",))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [("float32", 5), ("bfloat16", 300), ("float8_e4m3fn", 7168), ("int8", 16), ("float16", 2880), ("float32", 20000)],
)
@pytest.mark.parametrize("most", [3, 400])
def test_random_blocks(dtype, hidden, most, mesh, rng):
    sizes = random_sizes(rng, mesh, 3, most)
    x = normal(rng, mesh.chips, max(1, sizes.sum((1, 2)).max()), hidden)
    check(mesh, sizes, (x * 20).astype(dtype), BACKEND, num_rows=int(sizes.sum((0, 2)).max()) + 3)


@pytest.mark.gpu
@pytest.mark.parametrize("load", loads(4))
def test_cruel_loads(load, mesh, rng):
    check(mesh, loads(mesh.chips)[load], normal(rng, mesh.chips, 18, 256), BACKEND, num_rows=9 * mesh.chips)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["per_row", "1x128"])
def test_values_and_scales_travel_together(scaling, mesh, rng):
    sizes = random_sizes(rng, mesh, 4, 50)
    x = normal(rng, mesh.chips, max(1, sizes.sum((1, 2)).max()), 2048, dtype="bfloat16")
    check(mesh, sizes, jax.vmap(lambda x: quantize(x, "float8_e4m3fn", scaling=scaling))(x), BACKEND)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 1000])
@pytest.mark.parametrize("scaling", [None, "per_row", "1x128"])
def test_tokens_by_a_plan(scaling, num_tokens, mesh, rng):
    ids, sizes = tokens_for(rng, mesh, num_tokens, 2)
    x = normal(rng, mesh.chips, num_tokens, 2048, dtype="bfloat16")
    if scaling is not None:
        x = jax.vmap(lambda x: quantize(x, "float8_e4m3fn", scaling=scaling))(x)
    check_tokens(mesh, x, ids, sizes, BACKEND)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "top_k", "experts_each"), [(1, 1, 1), (16, 8, 32), (300, 2, 3), (5000, 8, 128)])
def test_routes_are_those_of_the_reference(num_tokens, top_k, experts_each, mesh, rng):
    num_experts = mesh.chips * experts_each
    loads = {
        "any": rng.integers(-1, num_experts, (mesh.chips, num_tokens, top_k)),
        "all to one": np.full((mesh.chips, num_tokens, top_k), num_experts - 1),
        "none": np.full((mesh.chips, num_tokens, top_k), -1),
        "one is silent": rng.integers(0, num_experts, (mesh.chips, num_tokens, top_k)),
    }
    loads["one is silent"][0] = -1
    num_rows = mesh.chips * num_tokens * top_k
    for load, ids in loads.items():
        found, expected = (
            jax.tree.map(np.asarray, routes_of(mesh, num_rows, num_experts, backend)(jnp.asarray(ids, jnp.int32)))
            for backend in (BACKEND, "xla")
        )
        (routes, sizes), (known, known_sizes) = found, expected
        np.testing.assert_array_equal(sizes, known_sizes, load)
        np.testing.assert_array_equal(routes.targets, known.targets, load)
        np.testing.assert_array_equal(routes.num_addresses, known.num_addresses, load)
        for chip, count in enumerate(known.num_addresses):
            np.testing.assert_array_equal(routes.addresses[chip, :count], known.addresses[chip, :count], load)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", [None, "per_row"])
def test_tokens_by_their_routes_and_back(scaling, mesh, rng):
    """What the exchange does with them, one after the other in one program, again and again."""
    num_tokens, top_k, num_experts = 40, 4, 8 * mesh.chips
    num_rows = mesh.chips * num_tokens * top_k
    run = by_routes_and_back(mesh, num_rows, num_experts, scaling, BACKEND)
    for _ in range(50):
        ids = jnp.asarray(rng.integers(-1, num_experts, (mesh.chips, num_tokens, top_k)), jnp.int32)
        x = normal(rng, mesh.chips, num_tokens, 512, dtype="bfloat16")
        back = np.asarray(run(x, ids).astype(jnp.float32)).reshape(mesh.chips, num_tokens, top_k, 512)
        sent = x if scaling is None else dequantize(quantize(x, "float8_e4m3fn", scaling=scaling), "bfloat16")
        expected = np.broadcast_to(np.asarray(sent.astype(jnp.float32))[:, :, None], back.shape)
        used = np.asarray(ids) >= 0
        np.testing.assert_allclose(back[used], expected[used], rtol=0.13 if scaling else 0)


@pytest.mark.gpu
def test_the_gradient_brings_rows_back(mesh, rng):
    sizes = random_sizes(rng, mesh, 2, 30)
    table, num_rows = blocks_of(tables(sizes)), int(sizes.sum((0, 2)).max())
    x = normal(rng, mesh.chips, max(1, sizes.sum((1, 2)).max()), 256)
    direction = normal(rng, mesh.chips, num_rows, 256)
    _, pullback = jax.vjp(lambda x: moving(mesh, num_rows, BACKEND)(x, table), x)
    back = moving(mesh, x.shape[1], BACKEND)(direction, jax.vmap(lambda blocks: blocks.back)(table))
    used = sizes.sum((1, 2))
    for chip in range(mesh.chips):
        assert same_bits(pullback(direction)[0][chip, : used[chip]], back[chip, : used[chip]])


@pytest.mark.gpu
def test_a_thousand_launches_of_two_kinds_in_turn(mesh, rng):
    """None hangs, none brings a wrong row, whatever ran before it and however uneven the chips are."""
    rows = {3: 256, 40: 2048}
    arrays = {most: normal(rng, mesh.chips, mesh.chips * 2 * most, hidden) for most, hidden in rows.items()}
    split = PartitionSpec("expert")

    @functools.partial(jax.jit, static_argnums=0)
    def wrong(num_rows, x, moved, table):
        """Elements of all blocks' rows that are not what they were."""
        sizes, sources, places = (t.transpose(1, 0, 2).reshape(mesh.chips, -1) for t in table)
        row = jnp.arange(num_rows)[None, :, None]
        inside = (places[:, None] <= row) & (row < (places + sizes)[:, None])
        block = inside.argmax(2)
        sender = block // table.shape[3]
        source = jnp.take_along_axis(sources - places, block, 1) + row[..., 0]
        expected = x[sender, jnp.clip(source, 0, x.shape[1] - 1)]
        return jnp.sum((moved != expected) & inside.any(2)[..., None])

    sharding = jax.sharding.NamedSharding(mesh.make(), split)
    arrays = {most: jax.device_put(x, sharding) for most, x in arrays.items()}
    total = jnp.zeros((), jnp.int32)
    for launch in range(1000):
        most = list(rows)[launch % 2]
        sizes = random_sizes(rng, mesh, 2, most) * rng.integers(0, 2, (mesh.chips, 1, 1))
        table = tables(sizes)
        num_rows = mesh.chips * 2 * most
        moved = moving(mesh, num_rows, BACKEND)(arrays[most], blocks_of(table))
        total += wrong(num_rows, arrays[most], moved, jnp.asarray(table))
    assert int(total) == 0


@pytest.mark.parametrize("mesh", [FOUR, OTHER_AXES], ids=str)
def test_targets(mesh, rng):
    """Each row's chip and place, told by blocks in any order."""
    sizes = random_sizes(rng, mesh, 3, 4)
    table = tables(sizes)
    for chip in range(mesh.chips):
        mine = Blocks(*table[:, chip], *table[:, :, chip])
        found = np.asarray(targets(mine, int(sizes[chip].sum()) + 5, 100))
        expected = np.full_like(found, -1)
        for peer, j in np.ndindex(sizes.shape[1:]):
            count, source, place = table[:, chip, peer, j]
            expected[source : source + count] = 100 * peer + place + np.arange(count)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scaling", [None, "per_row", "1x128"])
@pytest.mark.quick("per_row")
def test_routes_lower(scaling):
    x, ids = jnp.zeros((4, 16, 256), jnp.bfloat16), jnp.zeros((4, 16, 8), jnp.int32)
    lower_for_cuda(by_routes_and_back(FOUR, 512, 40, scaling, BACKEND), x, ids)


@pytest.mark.parametrize("mesh", [FOUR, OTHER_AXES], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.quick("bfloat16-4-of-8")
def test_lowers(dtype, mesh):
    blocks = Blocks(*[jnp.zeros((mesh.chips, mesh.chips, 2), jnp.int32)] * 6)
    moving.cache_clear()
    lower_for_cuda(moving(mesh, 32, BACKEND), jnp.zeros((mesh.chips * mesh.groups, 16, 300), dtype), blocks)
