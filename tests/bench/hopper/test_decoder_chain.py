"""The products of decoder layers, by the models' published sizes."""

import pytest

from bench.hopper.decoder_chain import MODELS, PRODUCTS, decoder_products
from bench.model.shapes import GemmShape
from pallas_kernels.chips import get_chip
from pallas_kernels.grouped_matmul.gpu.hopper import tiling


def test_products_of_qwen3():
    """Its dense layers, which the published model has none of, would be as wide as eight experts: 6144."""
    products = decoder_products("qwen3-30b-a3b", 64, "fp8")
    assert tuple(products) == PRODUCTS
    assert [product.shape for product in products.values()] == [
        GemmShape(1, 64, 2048, 5120),
        GemmShape(1, 64, 4096, 2048),
        GemmShape(1, 64, 2048, 12288),
        GemmShape(1, 64, 6144, 2048),
        GemmShape(128, 4, 2048, 1536),
        GemmShape(128, 4, 768, 2048),
    ]
    assert [name for name, product in products.items() if product.fused] == ["FFN1", "gate/up"]


def test_a_dense_layer_has_its_own_width_and_an_expert_a_row_at_least():
    products = decoder_products("llama-4-maverick", 8, "bf16")
    assert products["FFN2"].shape == GemmShape(1, 8, 16384, 5120)
    assert products["down"].shape == GemmShape(128, 1, 8192, 5120)


@pytest.mark.parametrize("model", MODELS)
def test_there_are_tiles_for_all_products(model):
    for product in decoder_products(model, 64, "fp8").values():
        assert tiling.fits(get_chip("h200"), product.problem, tiling.pick(get_chip("h200"), product.problem))
