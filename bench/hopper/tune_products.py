"""What `bench.tune` tunes unless told otherwise: the products of `bench.gpu`, then those of published models.

A model's layer gives two products, gate/up and down, each in BF16 and in the model's own 8-bit scaling; for chips that
hold all experts or an eighth of them, with few tokens on each chip (decode) and with many (prefill). Rows are spread
evenly; the buffers are as long as the exchange makes them.
"""

from collections.abc import Iterator

from bench.hopper.cases import CASES
from bench.hopper.products import Product, layer_products
from bench.model.shapes import GemmShape
from moejax import MoEConfig, get_preset
from moejax.stages import way_of
from sharding.exchange import pick_transport
from sharding.partition import expert_axes

MODELS = ("deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b")
EXPERT_GROUPS = (1, 8)
TOKENS_A_CHIP = (64, 4096)


def default_products() -> tuple[Product, ...]:
    """All of them, the most wanted first, each once."""
    models = [
        product
        for tokens in TOKENS_A_CHIP
        for name in MODELS
        for ep in EXPERT_GROUPS
        for product in model_products(get_preset(name), ep, tokens)
    ]
    return tuple(dict.fromkeys([*case_products(), *models]))


def case_products() -> tuple[Product, ...]:
    """The products of `bench.gpu`, of its backward pass the one with the transposed weights."""
    return tuple(dict.fromkeys(product for case in CASES.values() for product in case.products))


def model_products(config: MoEConfig, ep: int, tokens: int) -> Iterator[Product]:
    """Gate/up and down of a layer on one of `ep` chips that has `tokens` tokens of its own."""
    groups = config.num_experts // ep
    assignments = tokens * config.top_k
    way = way_of(config, expert_axes(ep))
    num_rows = pick_transport(way).rows_held(tokens, config.top_k, way)
    shape = GemmShape(groups, max(1, assignments // groups), config.hidden_size, config.intermediate_size)
    yield from layer_products(shape, "bf16", num_rows=num_rows)
    in_blocks = config.quantization.lhs_scaling == "1x128"
    yield from layer_products(shape, "fp8-blocks" if in_blocks else "fp8", num_rows=num_rows)
