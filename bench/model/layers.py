"""The layers of a decoder as one chip sees them: what each multiplies, attends to, looks up and sends, in order.

Nothing here knows how long anything takes; `bench.model.times` asks the cost models. Norms, activations, rotations,
scales and the choice of experts and keys are not counted, as DS_TPU does not.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.model.decoders import Decoder, GroupedQueryAttention, LatentAttention, SparseIndex
from bench.model.operator_time import ExchangeKind
from bench.model.shapes import AttentionShape, GemmShape
from bench.model.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Product:
    """A grouped matrix product."""

    name: str
    shape: GemmShape


@dataclasses.dataclass(frozen=True)
class Attend:
    """Queries against a cache."""

    name: str
    shape: AttentionShape


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Rows to or from the other chips: `num_bytes` are a chip's payload."""

    kind: ExchangeKind
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Lookup:
    """`rows` rows of `width` out of a table with `table` of them."""

    rows: int
    width: int
    table: int


Operator = Product | Attend | Exchange | Lookup


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer.

    Attributes:
      name: as DS_TPU's files and our tables call it.
      operators: in order of execution.
      weights: elements that a chip keeps for one such layer, whether a step touches them or not.
      cache: elements that it keeps of earlier tokens.
      arch: sizes that readers of evaluation.json want to know.
      count: how many the model has.
    """

    name: str
    operators: tuple[Operator, ...]
    weights: int
    cache: int = 0
    arch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    count: int = 1


def step_layers(decoder: Decoder, workload: Workload, kv_len: int, *, busiest: bool = False) -> list[Layer]:
    """The layers of a whole model in order of first use: embedding, attentions, dense MLP, experts, head.

    Args:
      decoder: what stands around the experts.
      workload: the layer of experts, its batch and its spread; all else is whole on every chip, for its own sequences.
      kv_len: tokens of each sequence that a query may see, those of the step among them.
      busiest: as in `moe_layer`.

    Raises:
      ValueError: kv_len is below the step's own tokens.
    """
    if kv_len < workload.q_len:
        raise ValueError(
            f"kv_len must be at least 1 and count the step's own tokens, q_len={workload.q_len}; got {kv_len}"
        )
    hidden, tokens = workload.hidden_size, workload.local_tokens
    table = decoder.vocab_size * hidden
    layers = [Layer("Embedding", (Lookup(tokens, hidden, decoder.vocab_size),), table)]
    for attention, count in decoder.attentions.items():
        if isinstance(attention, GroupedQueryAttention):
            layers.append(_grouped_query(attention, workload, kv_len, count))
            continue
        layers.append(_latent(attention, workload, kv_len, count))
        if attention.index is not None:
            layers.append(_index(attention, attention.index, workload, kv_len, count))
    if decoder.dense_layers:
        width = decoder.dense_intermediate_size
        products = list(_mlp("", 1, tokens, hidden, width))
        layers.append(_layer("MLP", products, decoder.dense_layers, intermediate_size=width))
    layers.append(dataclasses.replace(moe_layer(workload, busiest=busiest), count=decoder.moe_layers))
    head = Product("lm_head", GemmShape(1, tokens, hidden, decoder.vocab_size))
    layers.append(_layer("LMHead", [head], 1, vocab_size=decoder.vocab_size))
    return [dataclasses.replace(layer, arch={**_arch(workload), "kv_len": kv_len, **layer.arch}) for layer in layers]


def moe_layer(workload: Workload, *, busiest: bool = False) -> Layer:
    """Router, shared expert, routed experts, dispatch and combine.

    Router and shared expert are whole on every chip and see its own tokens. The rows of the routed experts are spread
    evenly over the activated ones.

    Args:
      workload: the layer, its batch and its spread.
      busiest: rows and activated experts are those of the chip that has the most of each, all tokens counted; otherwise
        the mean rows and the activated experts of DS_TPU, which counts sequences, and these up to a bound.
    """
    w = workload
    products = [Product("gate", GemmShape(1, w.local_tokens, w.hidden_size, w.num_experts))]
    if w.shared_intermediate_size:
        products += _mlp("shared_", 1, w.local_tokens, w.hidden_size, w.shared_intermediate_size)
    groups = w.busiest_experts if busiest else w.activated_expert_per_ep_group
    rows = math.ceil((w.busiest_rows if busiest else w.token_per_ep_group) / groups)
    routed = list(_mlp("routed_", groups, rows, w.hidden_size, w.intermediate_size // w.moe_tp))
    an_expert = sum(product.shape.weights for product in routed) // groups
    weights = sum(product.shape.weights for product in products) + an_expert * w.expert_per_ep_group
    arch = {
        "intermediate_size": w.intermediate_size,
        "token_per_ep_group": w.token_per_ep_group,
        "expert_per_ep_group": w.expert_per_ep_group,
        "m_per_group": w.m_per_group,
        "activated_expert_per_ep_group": w.activated_expert_per_ep_group,
        "mean_rows": w.token_per_ep_group,
        "busiest_rows": w.busiest_rows,
    }
    exchange = Exchange("dispatch", w.dispatch_bytes), Exchange("combine", w.combine_bytes)
    return Layer("MoE", (*products, *routed, *exchange), weights, arch={**_arch(w), **arch})


def _arch(workload: Workload) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in ("hidden_size", "batch_size", "batch_size_local", "q_len")}


def _mlp(prefix: str, groups: int, rows: int, hidden: int, width: int) -> Iterator[Product]:
    for name, k, n in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)):
        yield Product(f"{prefix}{name}_proj", GemmShape(groups, rows, k, n))


def _layer(name: str, operators: Sequence[Operator], count: int, cache: int = 0, **arch: Any) -> Layer:
    """One that keeps the weights of its products and no others."""
    weights = sum(operator.shape.weights for operator in operators if isinstance(operator, Product))
    return Layer(name, tuple(operators), weights, cache, arch, count)


def _grouped_query(attention: GroupedQueryAttention, w: Workload, kv_len: int, count: int) -> Layer:
    a, hidden = attention, w.hidden_size
    group, width, kv_width = a.heads // a.kv_heads, a.heads * a.head_dim, a.kv_heads * a.head_dim
    keys = min(kv_len, kv_len if a.window is None else a.window + w.q_len - 1)
    caches = w.batch_size_local * a.kv_heads
    shape = AttentionShape(
        caches,
        group * w.q_len,
        keys,
        a.head_dim,
        a.head_dim,
        pairs=group * visible_pairs(w.q_len, kv_len, a.window),
        keys=caches * keys,
        query_width=width,
    )
    products = [
        Product(name, GemmShape(1, w.local_tokens, k, n))
        for name, k, n in (
            ("q_proj", hidden, width),
            ("k_proj", hidden, kv_width),
            ("v_proj", hidden, kv_width),
            ("o_proj", width, hidden),
        )
    ]
    name = "GQA" if a.window is None else "GQA-window"
    operators: list[Operator] = [*products[:3], Attend("attention", shape), *products[3:]]
    return _layer(name, operators, count, cache=2 * caches * keys * a.head_dim, **_settings(a))


def _latent(attention: LatentAttention, w: Workload, kv_len: int, count: int) -> Layer:
    """Absorbed: queries are brought to the latent space, where one head of keys and values serves them all."""
    a, hidden, tokens = attention, w.hidden_size, w.local_tokens
    query_width = a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    kept = a.kv_lora_rank + a.qk_rope_head_dim
    cached = w.batch_size_local * kv_len
    if a.index is None:
        caches, rows, seen = w.batch_size_local, a.heads * w.q_len, kv_len
        pairs = a.heads * visible_pairs(w.q_len, kv_len)
    else:  # every token has keys of its own
        caches, rows, seen = tokens, a.heads, min(a.index.top_k, kv_len)
        pairs = a.heads * visible_pairs(w.q_len, kv_len, a.index.top_k) // w.q_len
    shape = AttentionShape(
        caches,
        rows,
        seen,
        kept,
        a.kv_lora_rank,
        pairs=pairs,
        keys=min(caches * seen, cached),
        query_width=query_width,
        latent=True,
    )
    products = [
        Product(name, GemmShape(groups, tokens, k, n))
        for name, groups, k, n in (
            ("q_a_proj", 1, hidden, a.q_lora_rank),
            ("q_b_proj", 1, a.q_lora_rank, query_width),
            ("kv_a_proj", 1, hidden, kept),
            ("w_kc", a.heads, a.qk_nope_head_dim, a.kv_lora_rank),
            # From the latent space to a head's value; DS_TPU charges it with the extents of w_kc.
            ("w_vc", a.heads, a.v_head_dim, a.kv_lora_rank),
            ("o_proj", 1, a.heads * a.v_head_dim, hidden),
        )
    ]
    operators: list[Operator] = [*products[:4], Attend("attention", shape), *products[4:]]
    return _layer("MLA", operators, count, cache=cached * kept, **_settings(a, "index"))


def _index(attention: LatentAttention, index: SparseIndex, w: Workload, kv_len: int, count: int) -> Layer:
    """DS_TPU takes half of a key for its value, so that scores without values cost what they should."""
    width, tokens = index.heads * index.head_dim, w.local_tokens
    shape = AttentionShape(
        w.batch_size_local,
        index.heads * w.q_len,
        kv_len,
        index.head_dim // 2,
        index.head_dim // 2,
        pairs=index.heads * visible_pairs(w.q_len, kv_len),
        keys=w.batch_size_local * kv_len,
        query_width=width,
    )
    products = [
        Product(name, GemmShape(1, tokens, k, n))
        for name, k, n in (
            ("wq_b", attention.q_lora_rank, width),
            ("wk", w.hidden_size, index.head_dim),
            ("weights_proj", w.hidden_size, index.heads),
        )
    ]
    cache = w.batch_size_local * kv_len * index.head_dim
    return _layer("DSA", [*products, Attend("index", shape)], count, cache=cache, **_settings(index))


def _settings(value: Any, *without: str) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name not in without}


def visible_pairs(q_len: int, kv_len: int, window: int | None = None) -> int:
    """Pairs of one of the last `q_len` tokens of `kv_len` and a key that it sees: all up to itself, or the window's."""
    first = kv_len - q_len + 1  # keys of the first of them
    limit = kv_len if window is None else window
    growing = min(max(limit - first, 0), q_len)  # tokens that see fewer than the limit
    return growing * (2 * first + growing - 1) // 2 + (q_len - growing) * min(limit, kv_len)
