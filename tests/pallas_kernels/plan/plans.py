"""Plans by plain Python loops: what the suites of plan, dispatch and combine compare with."""

import functools

import jax
import numpy as np

from pallas_kernels.plan import make_plan

planned = jax.jit(make_plan, static_argnums=1, static_argnames=("num_groups", "capacity"))


def expected_plan(topk_ids, num_groups: int, capacity: int | None = None) -> dict[str, np.ndarray]:
    """Every field of the plan: assignments placed one by one, in the order that the documentation gives."""
    ids = np.asarray(topk_ids).astype(np.int64)
    num_tokens, top_k = ids.shape
    wanted = [[] for _ in range(num_groups)]
    if capacity is None:
        visits = ((t, k) for t in range(num_tokens) for k in range(top_k))
    else:
        visits = ((t, k) for k in range(top_k) for t in range(num_tokens))
    for t, k in visits:
        if 0 <= ids[t, k] < num_groups:
            wanted[ids[t, k]].append((t, k))
    kept = [group[:capacity] for group in wanted]
    sizes = np.array([len(group) for group in kept])
    offsets = np.cumsum(sizes) - sizes if capacity is None else capacity * np.arange(num_groups)
    order = np.full(num_tokens * top_k if capacity is None else num_groups * capacity, -1)
    inverse = np.full((num_tokens, top_k), -1)
    for group, offset in zip(kept, offsets, strict=True):
        for row, (t, k) in enumerate(group, start=offset):
            order[row] = t * top_k + k
            inverse[t, k] = row
    dropped = np.array(sum(map(len, wanted)) - sizes.sum())
    return dict(order=order, inverse=inverse, group_sizes=sizes, offsets=offsets, dropped=dropped)


@functools.cache
def jitted(function, **options):
    return jax.jit(functools.partial(function, **options))
