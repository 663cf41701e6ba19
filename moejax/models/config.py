"""What the parts of a decoder block are; names are those of Hugging Face's configuration files, if these have one."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from moejax.checks import check_float_dtype, require, require_integer, require_number
from moejax.config import MoEConfig
from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.backend import check_backend

AttentionBackend = Literal["auto", "cudnn", "xla"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions (RoPE, arXiv 2104.09864).

    Attributes:
      hidden_size: H, width of a token.
      num_attention_heads: N, heads of queries.
      num_key_value_heads: G, heads of keys and values; each serves N / G heads of queries.
      head_dim: D, width of a head; N·D need not be H.
      rope_theta: base of the rotary frequencies.
      qk_norm: whether each head's query and key pass an RMSNorm before they are turned (Qwen3).
      attention_bias: whether the projections have biases (gpt-oss).
      rms_norm_eps: of the norms of queries and keys.
      dtype: the dtype to compute in: bfloat16, float16 or float32.
      param_dtype: of the parameters.
      backend: whose product of queries and keys: "cudnn", "xla", or "auto" for the first where it runs. cuDNN's
        gradient adds in no fixed order: equal bits in training want "xla". With "xla" all of attention is XLA's; with
        the others products with weights, if they have no bias, are `pallas_kernels.dense_matmul`'s where it is faster:
        on one Hopper GPU, where no gradient is asked for.

    Raises:
      ValueError: on construction, when a field or a combination of fields makes no sense.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    param_dtype: jax.typing.DTypeLike = jnp.float32
    backend: AttentionBackend = "auto"

    def __post_init__(self):
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            require_integer(name, getattr(self, name), at_least=1)
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"a multiple of num_key_value_heads={self.num_key_value_heads}",
            self.num_attention_heads,
        )
        require(self.head_dim % 2 == 0, "head_dim", "even, as rotary positions turn pairs", self.head_dim)
        require_number("rope_theta", self.rope_theta, positive=True)
        require_number("rms_norm_eps", self.rms_norm_eps, positive=True)
        for name in ("qk_norm", "attention_bias"):
            require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        _check_dtypes(self)
        known = get_args(AttentionBackend)
        require(self.backend in known, "backend", f"one of {', '.join(map(repr, known))}", self.backend)


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A dense gated feed-forward network: down(act(gate(x)) · up(x)).

    Attributes:
      hidden_size: H, width of a token.
      intermediate_size: I, width of gate and up.
      activation: silu, gelu, gelu_tanh, relu2 or swigluoai.
      activation_limit: clamp of gate and up before the activation, or None.
      dtype: the dtype to compute in: bfloat16, float16 or float32.
      param_dtype: of the parameters.
      backend: "auto", "xla" (two dots), or "pallas_tpu" and "pallas_gpu" (the experts' kernels, of one group). "auto"
        is on a GPU `pallas_kernels.dense_matmul` where that is faster and no gradient is asked for, else two dots for
        few tokens or few numbers of y, else the experts' kernels; on CPUs two dots. It goes by the platform at hand
        when it is traced, so that what a CPU exports for others has dots.

    Raises:
      ValueError: on construction, when a field makes no sense.
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation = "silu"
    activation_limit: float | None = None
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    param_dtype: jax.typing.DTypeLike = jnp.float32
    backend: str = "auto"

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size"):
            require_integer(name, getattr(self, name), at_least=1)
        check_activation(self.activation, self.activation_limit)
        _check_dtypes(self)
        check_backend(self.backend)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Attention and a feed-forward network, each behind a norm and beside a residual.

    Attributes:
      attention: of the tokens with each other.
      feed_forward: of each token: experts, or a dense network.
      rms_norm_eps: of the two norms.

    Raises:
      ValueError: on construction, when the parts differ in what they must share.
    """

    attention: AttentionConfig
    feed_forward: MoEConfig | MLPConfig
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        for name, kinds in {"attention": AttentionConfig, "feed_forward": MoEConfig | MLPConfig}.items():
            value, wanted = getattr(self, name), " or ".join(kind.__name__ for kind in get_args(kinds) or (kinds,))
            if not isinstance(value, kinds):
                raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        require_number("rms_norm_eps", self.rms_norm_eps, positive=True)
        for name in ("hidden_size", "dtype", "param_dtype"):
            wanted, got = getattr(self.attention, name), getattr(self.feed_forward, name)
            if name != "hidden_size":
                wanted, got = jnp.dtype(wanted).name, jnp.dtype(got).name
            require(wanted == got, f"feed_forward.{name}", f"that of attention, {wanted}", got)

    @property
    def hidden_size(self) -> int:
        """H, width of a token."""
        return self.attention.hidden_size


def _check_dtypes(config: AttentionConfig | MLPConfig) -> None:
    for name in ("dtype", "param_dtype"):
        check_float_dtype(name, getattr(config, name))
