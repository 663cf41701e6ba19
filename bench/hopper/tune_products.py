"""What `bench.tune` tunes unless told otherwise: the products of `bench.gpu`, then those of published models.

A model's layer gives two products, gate/up and down, each in BF16 and in the model's own 8-bit scaling; for chips that
hold all experts or an eighth of them, with few tokens on each chip (decode) and with many (prefill). Rows are spread
evenly; the buffers are as long as the exchange makes them.
"""

from collections.abc import Iterator

from bench.hopper.cases import CASES
from bench.hopper.products import Product, ProductDtype
from bench.model.workloads import GemmShape
from moejax import MoEConfig, get_preset
from sharding.exchange.plan import fit_slab

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
        for product in layer_products(get_preset(name), ep, tokens)
    ]
    return tuple(dict.fromkeys([*case_products(), *models]))


def case_products() -> tuple[Product, ...]:
    """The products of `bench.gpu`, of its backward pass the one with the transposed weights."""
    return tuple(dict.fromkeys(product for name in CASES for product in _of_case(name)))


def layer_products(config: MoEConfig, ep: int, tokens: int) -> Iterator[Product]:
    """Gate/up and down of a layer on one of `ep` chips that has `tokens` tokens of its own."""
    groups = config.num_experts // ep
    assignments = tokens * config.top_k
    num_rows = assignments if ep == 1 else ep * fit_slab(tokens, config.top_k, groups, ep, None)[0]
    rows = max(1, assignments // groups)
    hidden, width = config.hidden_size, config.intermediate_size
    eight_bits: ProductDtype = "fp8-blocks" if config.quantization.lhs_scaling == "1x128" else "fp8"
    dtypes: tuple[ProductDtype, ...] = ("bf16", eight_bits)
    for dtype in dtypes:
        yield Product(GemmShape(groups, rows, hidden, 2 * width), dtype, True, num_rows)
        yield Product(GemmShape(groups, rows, width, hidden), dtype, False, num_rows)


def _of_case(name: str) -> tuple[Product, ...]:
    case = CASES[name]
    s = case.shape
    if name.startswith("permute"):
        return ()
    if name.startswith(("layer", "qwen3")):
        dtype: ProductDtype = "fp8-blocks" if name.startswith("qwen3-fp8") else case.dtype
        in_8_bits = case.dtype == "fp8"
        gate_up = Product(GemmShape(s.G, s.M, s.K, 2 * s.N), dtype, fused=True, result_in_8_bits=in_8_bits)
        return gate_up, Product(GemmShape(s.G, s.M, s.N, s.K), "fp8-blocks" if in_8_bits else dtype)
    if name.startswith("backward"):
        return Product(s, case.dtype), Product(GemmShape(s.G, s.M, s.N, s.K), case.dtype, transposed=True)
    return (Product(s, "fp8-blocks" if name.endswith("blocks") else case.dtype),)
