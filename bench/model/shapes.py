"""The shapes of what is multiplied, and the short names of their dtypes.

A shape knows how much there is to do and nothing of how long it takes.
"""

import dataclasses
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bench.command.values import POSITIVE_INTS

# What each precision's and each command line's short name stands for.
OPERAND_DTYPES: dict[str, jnp.dtype] = {
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
    "int8": jnp.dtype(jnp.int8),
    "bf16": jnp.dtype(jnp.bfloat16),
    "fp16": jnp.dtype(jnp.float16),
}
OUTPUT_BYTES = 2  # what is multiplied writes BF16, and combine travels in BF16


def operand_dtype(name: str) -> jnp.dtype:
    """The dtype called `name` on command lines.

    Raises:
      ValueError: the name is not one of `OPERAND_DTYPES`.
    """
    try:
        return OPERAND_DTYPES[name]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(OPERAND_DTYPES)}, got {name!r}") from None


def up(extent, step: int):
    """The least multiple of `step` that is no smaller; `extent` may be an array."""
    return -(-extent // step) * step


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """C[g] = A[g] (M × K) · B[g] (K × N) for g = 1..G."""

    G: int
    M: int
    K: int
    N: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {self!r}")

    def __str__(self) -> str:
        return shape_text(self.params)

    @property
    def params(self) -> dict[str, int]:
        """G, M, K and N by name."""
        return dataclasses.asdict(self)

    @property
    def flops(self) -> int:
        """FLOPs without padding; a multiply-add is two."""
        return 2 * self.G * self.M * self.K * self.N

    @property
    def weights(self) -> int:
        """Elements of B over all groups."""
        return self.G * self.K * self.N


def parse_shape(text: str) -> GemmShape:
    """The shape written as "G,M,K,N" on a command line.

    Raises:
      ValueError: the text is not four positive whole numbers.
    """
    try:
        return GemmShape(*POSITIVE_INTS(text))
    except (ArgumentTypeError, TypeError):
        raise ValueError(
            f"--shape must be four positive whole numbers G,M,K,N like 8,48,7168,2048, below 2^63, got {text!r}"
        ) from None


def shape_text(shape: Mapping[str, Any]) -> str:
    """G,M,K,N of a record, as command lines take them."""
    return ",".join(str(shape[dim]) for dim in "GMKN")


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """softmax(Q · Kᵀ) · V in each of B caches.

    Attributes:
      B: caches, one for each sequence and key-value head.
      QS: rows of Q in a cache: the query heads that share it, times the tokens of the step.
      KS: keys that these rows see together.
      QD: width of a query and of a key.
      VD: width of a value.
      pairs: of a row and a key that it sees, in one cache: QS · KS but for what causality and windows leave out.
      keys: that are read, in all caches: B · KS but for those that several of them share.
      latent: a value is the beginning of its key, so that who reads the keys has read the values.
      query_width: of the product that makes the queries of all heads; no time depends on it, only what DS_TPU prints.
    """

    B: int
    QS: int
    KS: int
    QD: int
    VD: int
    pairs: int
    keys: int
    query_width: int
    latent: bool = False

    def __str__(self) -> str:
        return ",".join(map(str, self.params.values()))

    @property
    def params(self) -> dict[str, int]:
        """B, QS, KS, QD and VD by name."""
        return {name: getattr(self, name) for name in ("B", "QS", "KS", "QD", "VD")}
