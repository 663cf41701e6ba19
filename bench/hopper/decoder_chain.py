"""The products of a decoder layer with few tokens, in the order in which they run.

A dense product is a grouped one of a single group. A model without dense layers gets a dense MLP as wide as the experts
of a token together, so that each model has products of every kind:

    QKV -> output -> FFN1 -> FFN2 -> gate/up -> down
"""

from bench.hopper.products import Product, ProductDtype
from bench.model.decoders import DECODERS, GroupedQueryAttention
from bench.model.shapes import GemmShape
from moejax import get_preset

MODELS = tuple(
    name for name, decoder in DECODERS.items() if isinstance(next(iter(decoder.attentions)), GroupedQueryAttention)
)
"""Those whose attention has one product before it and one behind it."""

PRODUCTS = ("QKV", "output", "FFN1", "FFN2", "gate/up", "down")
"""Names of the products: of the attention, the dense MLP and the experts."""


def decoder_products(model: str, tokens: int, dtype: ProductDtype) -> dict[str, Product]:
    """The products by the names in `PRODUCTS`; FFN1 and gate/up are fused with silu.

    Args:
      model: one of `MODELS`.
      tokens: of a step, each with its own choice of experts; these spread evenly, one row at least for each.
      dtype: of all operands.
    """
    layer, decoder = get_preset(model), DECODERS[model]
    attention = next(iter(decoder.attentions))
    assert isinstance(attention, GroupedQueryAttention)  # as `MODELS` says
    hidden, experts, wide = layer.hidden_size, layer.num_experts, layer.intermediate_size
    heads = attention.heads * attention.head_dim
    all_heads = heads + 2 * attention.kv_heads * attention.head_dim
    dense_wide = decoder.dense_intermediate_size or layer.top_k * wide
    rows = max(1, tokens * layer.top_k // experts)

    def product(groups: int, rows: int, depth: int, columns: int, fused: bool = False) -> Product:
        return Product(GemmShape(groups, rows, depth, columns), dtype, fused)

    return {
        "QKV": product(1, tokens, hidden, all_heads),
        "output": product(1, tokens, heads, hidden),
        "FFN1": product(1, tokens, hidden, 2 * dense_wide, fused=True),
        "FFN2": product(1, tokens, dense_wide, hidden),
        "gate/up": product(experts, rows, hidden, 2 * wide, fused=True),
        "down": product(experts, rows, wide, hidden),
    }
