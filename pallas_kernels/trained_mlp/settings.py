"""What is fixed at trace time of experts in training."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.gated_activation import SCALING
from pallas_kernels.quantize import Quantization


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed at trace time.

    Attributes:
      activation: of the gate.
      limit: the clamp before it, or None.
      quantization: how operands are rounded to 8 bits, or None; see `fits`.
      k_major: whether weights of gate/up, and of down, have K last.
      dtype: of rows.
      weights_dtype: what weights that are not rounded are cast to; None for as they come.
    """

    activation: Activation
    limit: float | None
    quantization: Quantization | None
    k_major: tuple[bool, bool]
    dtype: jnp.dtype
    weights_dtype: jnp.dtype | None = None

    @property
    def rounds_to(self) -> jnp.dtype | None:
        """The dtype of 8 bits of the factors of products, None if they are not rounded."""
        return None if self.quantization is None else jnp.dtype(self.quantization.dtype)

    @property
    def weights_gradients_round_to(self) -> jnp.dtype | None:
        """That of cotangents where gradients of weights are taken."""
        quantization = self.quantization
        if quantization is None or quantization.weights_gradient_dtype is None:
            return None
        return jnp.dtype(quantization.weights_gradient_dtype)

    @property
    def gradients_round_to(self) -> jnp.dtype | None:
        """That of cotangents where gradients of rows are taken."""
        quantization = self.quantization
        return (
            None
            if quantization is None or quantization.gradient_dtype is None
            else jnp.dtype(quantization.gradient_dtype)
        )


def fits(quantization: Quantization | None, width: int) -> bool:
    """Whether experts of that width can be trained here: activated rows are rounded as `gated_activation` does."""
    return quantization is None or (quantization.lhs_scaling == SCALING and width % 128 == 0)
