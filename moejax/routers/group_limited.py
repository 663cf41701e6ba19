"""Group-limited routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): a token's experts lie in few groups.

With a group on each node, a token travels to few nodes. A group is as good as the sum of its two best scores.
"""

import math

from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.routers.layer import RoutedMoE
from moejax.routers.loss_free import LossFree, deepseek_choice


def group_limited(
    config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None, update_rate: float = 1e-3
) -> RoutedMoE:
    """`loss_free`, with the choice limited to the best topk_groups of num_groups groups.

    A `config` without groups (num_groups = 1) gets the most of 8, 4 and 2 groups that leave two experts or more in
    each, and half of them for a token, or as many as top_k needs.

    Raises:
      ValueError: the experts do not divide into groups of two and more.
    """
    num_groups, topk_groups = config.num_groups, config.topk_groups
    if num_groups == 1:
        num_groups, topk_groups = default_groups(config.num_experts, config.top_k)
    config = deepseek_choice(config, num_groups=num_groups, topk_groups=topk_groups)
    router = LossFree(config, rngs=rngs, mesh=mesh, update_rate=update_rate)
    return RoutedMoE(config, router, rngs=rngs, mesh=mesh)


def default_groups(num_experts: int, top_k: int) -> tuple[int, int]:
    """num_groups and topk_groups for a configuration that has none: (8, 4) for 64 experts and top_k 8."""
    for num_groups in (8, 4, 2):
        group_size = num_experts // num_groups
        if num_experts % num_groups == 0 and group_size >= 2:
            return num_groups, max(num_groups // 2, math.ceil(top_k / group_size))
    raise ValueError(
        f"num_experts={num_experts} does not divide into 8, 4 or 2 groups of two experts or more; set num_groups and "
        "topk_groups in the configuration, or take another number of experts"
    )
