"""The Switch Transformer's router (Fedus et al. 2021, arXiv 2101.03961): one expert a token, with a capacity."""

from flax import nnx
from jax.sharding import Mesh

from moejax.config import MoEConfig
from moejax.routers.base import or_default, plain_choice
from moejax.routers.layer import RoutedMoE
from moejax.routers.softmax import ScoreRouter


def switch(config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None) -> RoutedMoE:
    """Top-1 of softmax scores, weighted by the score itself.

    An expert takes capacity_factor · T / E tokens of each chip, and the rest is dropped and counted; the default factor
    is 1.25, and that of load_balance_loss 0.01, both the paper's. config.top_k is not looked at. The paper's jitter of
    the gate's inputs is left out.
    """
    config = plain_choice(config, top_k=1, normalize_topk=False)
    config = or_default(config, capacity_factor=1.25, load_balance_loss=0.01)
    return RoutedMoE(config, ScoreRouter(config, rngs=rngs, mesh=mesh), rngs=rngs, mesh=mesh)
