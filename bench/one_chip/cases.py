"""A case of topk, permute or layer: which operators, at which sizes, under which load. One idea of equality for all.

case = Case("permute", tokens=8192, hidden=2048, experts=32, k=2)
case.key   # "permute tokens=8192 hidden=2048 experts=32 k=2 … seed=0": what a file is searched for to resume
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp

from bench.one_chip.layouts import LAYOUTS
from pallas_kernels.backend import check_backend
from sharding.exchange.capacity import expert_capacity

Bench = Literal["topk", "permute", "layer"]
BENCHES: Sequence[Bench] = ("topk", "permute", "layer")
LoadKind = Literal["balanced", "zipf", "text"]
LOADS: Sequence[LoadKind] = ("balanced", "zipf", "text")

DTYPES: Mapping[str, str] = MappingProxyType({"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"})


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, load and choice of variants.

    Attributes:
      bench: "topk", "permute" or "layer".
      tokens: T.
      experts: E.
      k: K, choices of a token.
      hidden: H; for "topk" only the width that the logits are made with.
      intermediate: I, width of an expert ("layer"); 0 for the others.
      capacity_factor: of the padded layout; overflow is counted against it in every layout.
      dtype: "fp16", "bf16" or "fp32": of activations and weights.
      load: "balanced", "zipf" or "text".
      zipf_exponent: of the load "zipf".
      text: path of the text of the load "text"; None for a text that Python carries.
      layouts: those that are run, the one that the others are compared with first.
      split: those of them whose stages are timed one by one beside the whole.
      block: rows of a block in the block-sparse layout.
      backend: of our operators: "auto", "xla", "pallas_tpu" or "pallas_gpu".
      with_xla: whether the first layout runs in plain XLA as well, to compare with.
      batch: sequences, where the tokens are given as batch × length; else None.
      length: tokens of a sequence, likewise.
      seed: of all that is random.

    Raises:
      ValueError: on construction, when a field makes no sense.
    """

    bench: Bench
    tokens: int
    experts: int
    k: int
    hidden: int
    intermediate: int = 0
    capacity_factor: float = 1.25
    dtype: str = "bf16"
    load: LoadKind = "balanced"
    zipf_exponent: float = 1.0
    text: str | None = None
    layouts: tuple[str, ...] = ("compact",)
    split: tuple[str, ...] = ("compact",)
    block: int = 128
    backend: str = "auto"
    with_xla: bool = False
    batch: int | None = None
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.bench in BENCHES, "bench", f"one of {', '.join(BENCHES)}", self.bench)
        for name in ("tokens", "experts", "k", "hidden", "block"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.k <= self.experts, "k", f"at most experts={self.experts}", self.k)
        _require(self.hidden >= self.experts, "hidden", f"at least experts={self.experts}", self.hidden)
        _require(self.intermediate >= (self.bench == "layer"), "intermediate", "at least 1", self.intermediate)
        _require(0 < self.capacity_factor < float("inf"), "capacity factor", "positive", self.capacity_factor)
        _require(0 <= self.zipf_exponent < float("inf"), "zipf exponent", "at least 0", self.zipf_exponent)
        _require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _require(self.load in LOADS, "load", f"one of {', '.join(LOADS)}", self.load)
        _require(bool(self.layouts), "layouts", f"some of {', '.join(LAYOUTS)}", self.layouts)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        for name in self.layouts:
            if name not in LAYOUTS:
                raise ValueError(f"unknown layout {name!r}; expected one of {', '.join(LAYOUTS)}")
        strangers = set(self.split) - set(self.layouts)
        _require(not strangers, "split", f"some of the layouts {', '.join(self.layouts)}", self.split)
        check_backend(self.backend)
        given = [size for size in (self.batch, self.length) if size is not None]
        if given and (len(given) < 2 or math.prod(given) != self.tokens):
            raise ValueError(f"batch × length must be tokens={self.tokens}, got {self.batch} × {self.length}")

    @property
    def capacity(self) -> int:
        """C, rows of an expert in the padded layout."""
        return expert_capacity(self.tokens, self.k, self.experts, self.capacity_factor)

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The dtype of activations and weights."""
        return jnp.dtype(DTYPES[self.dtype])

    @property
    def programs_key(self) -> tuple[object, ...]:
        """Equal for the cases that can share programs: they differ by their load and capacity only."""
        own = ("capacity_factor", "load", "zipf_exponent", "text", "seed", "batch", "length")
        return tuple(value for name, value in vars(self).items() if name not in own)

    @property
    def key(self) -> str:
        """One line that tells the case apart from all others."""
        silent = {"bench"} if self.load == "zipf" else {"bench", "zipf_exponent"}
        given = {name: value for name, value in vars(self).items() if name not in silent and value is not None}
        parts = (f"{name}={'+'.join(v) if isinstance(v, tuple) else v}" for name, v in given.items())
        return " ".join([self.bench, *parts])

    @property
    def title(self) -> str:
        """A few words for people."""
        tokens = f"{self.batch}×{self.length}" if self.batch is not None else f"{self.tokens}"
        return f"{self.bench} T {tokens}, H {self.hidden}, E {self.experts}, K {self.k}, {self.dtype}, {self.load}"


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
