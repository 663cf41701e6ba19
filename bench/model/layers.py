"""The layers of a decoder as one chip sees them: what each multiplies, attends to, looks up and sends, in order.

Nothing here knows how long anything takes; `bench.model.times` asks the cost models. Norms, activations, rotations,
scales and the choice of experts and keys are not counted, as DS_TPU does not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bench.model.decoders import Decoder, GroupedQueryAttention, LatentAttention, SparseIndex
from bench.model.operator_time import ExchangeKind
from bench.model.shapes import AttentionShape, GemmShape
from bench.model.workloads import Workload


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


Operator = GemmShape | AttentionShape | Exchange | Lookup


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer.

    Attributes:
      name: as DS_TPU's files and our tables call it.
      operators: by name, in order of execution.
      weights: elements that a chip keeps for one such layer, whether a step touches them or not.
      cache: elements that it keeps of earlier tokens.
      arch: sizes that readers of evaluation.json want to know.
      count: how many the model has.
    """

    name: str
    operators: Mapping[str, Operator]
    weights: int
    cache: int = 0
    arch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    count: int = 1


def step_layers(decoder: Decoder, workload: Workload, kv_len: int, *, as_ds_tpu: bool = True) -> list[Layer]:
    """The layers of a whole model in order of first use: embedding, attentions, dense MLP, experts, head.

    Args:
      decoder: what stands around the experts.
      workload: the layer of experts, its batch and its spread; all else is whole on every chip, for its own sequences.
      kv_len: tokens of each sequence that a query may see, those of the step among them.
      as_ds_tpu: count the rows, experts and extents that DS_TPU counts, see `moe_layer` and `_latent`; otherwise those
        that the busiest chip has.

    Raises:
      ValueError: kv_len is below the step's own tokens.
    """
    w = workload
    if kv_len < w.q_len:
        raise ValueError(f"kv_len must be at least 1 and count the step's own tokens, q_len={w.q_len}; got {kv_len}")
    lookup = Lookup(w.local_tokens, w.hidden_size, decoder.vocab_size)
    layers = [Layer("Embedding", {"lookup": lookup}, weights=decoder.vocab_size * w.hidden_size)]
    for attention, count in decoder.attentions.items():
        if isinstance(attention, GroupedQueryAttention):
            layers.append(_grouped_query(attention, w, kv_len, count))
            continue
        layers.append(_latent(attention, w, kv_len, count, as_ds_tpu=as_ds_tpu))
        if attention.index is not None:
            layers.append(_index(attention.index, attention.q_lora_rank, w, kv_len, count))
    if decoder.dense_layers:
        width = decoder.dense_intermediate_size
        mlp = _mlp("", 1, w.local_tokens, w.hidden_size, width)
        layers.append(Layer("MLP", mlp, _weights(mlp), arch={"intermediate_size": width}, count=decoder.dense_layers))
    layers.append(dataclasses.replace(moe_layer(w, as_ds_tpu=as_ds_tpu), count=decoder.moe_layers))
    head = GemmShape(1, w.local_tokens, w.hidden_size, decoder.vocab_size)
    layers.append(Layer("LMHead", {"lm_head": head}, head.weights, arch={"vocab_size": decoder.vocab_size}))
    return [dataclasses.replace(layer, arch={**_arch(w), "kv_len": kv_len, **layer.arch}) for layer in layers]


def moe_layer(workload: Workload, *, as_ds_tpu: bool = True) -> Layer:
    """Router, shared expert, routed experts, and over several chips dispatch and combine.

    Router and shared expert are whole on every chip and see its own tokens. The rows of the routed experts are spread
    evenly over the activated ones.

    Args:
      workload: the layer, its batch and its spread.
      as_ds_tpu: rows are a chip's mean, and activated experts those of DS_TPU, which counts sequences, and these up to
        a bound; otherwise both are those of the chip that has the most of each, all tokens counted.
    """
    w = workload
    products = {"gate": GemmShape(1, w.local_tokens, w.hidden_size, w.num_experts)}
    if w.shared_intermediate_size:
        products |= _mlp("shared_", 1, w.local_tokens, w.hidden_size, w.shared_intermediate_size)
    groups = w.activated_expert_per_ep_group if as_ds_tpu else w.busiest_experts
    rows = w.token_per_ep_group if as_ds_tpu else math.ceil(w.busiest_rows)
    routed = _mlp("routed_", groups, math.ceil(rows / groups), w.hidden_size, w.intermediate_size // w.moe_tp)
    weights = _weights(products) + _weights(routed) // groups * w.expert_per_ep_group
    arch = {
        "intermediate_size": w.intermediate_size,
        "token_per_ep_group": w.token_per_ep_group,
        "expert_per_ep_group": w.expert_per_ep_group,
        "m_per_group": w.m_per_group,
        "activated_expert_per_ep_group": w.activated_expert_per_ep_group,
        "mean_rows": w.token_per_ep_group,
        "busiest_rows": w.busiest_rows,
    }
    operators: dict[str, Operator] = {**products, **routed}
    if w.ep > 1:
        operators["dispatch"] = Exchange("dispatch", w.dispatched(rows))
        operators["combine"] = Exchange("combine", w.combined(rows))
    return Layer("MoE", operators, weights, arch={**_arch(w), **arch})


def _arch(workload: Workload) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in ("hidden_size", "batch_size", "batch_size_local", "q_len")}


def _mlp(prefix: str, groups: int, rows: int, hidden: int, width: int) -> dict[str, GemmShape]:
    return {
        f"{prefix}gate_proj": GemmShape(groups, rows, hidden, width),
        f"{prefix}up_proj": GemmShape(groups, rows, hidden, width),
        f"{prefix}down_proj": GemmShape(groups, rows, width, hidden),
    }


def _weights(operators: Mapping[str, Operator]) -> int:
    """Elements that all products multiply with."""
    return sum(operator.weights for operator in operators.values() if isinstance(operator, GemmShape))


def _grouped_query(attention: GroupedQueryAttention, w: Workload, kv_len: int, count: int) -> Layer:
    a, hidden, tokens = attention, w.hidden_size, w.local_tokens
    group, width, kv_width = a.heads // a.kv_heads, a.heads * a.head_dim, a.kv_heads * a.head_dim
    caches = w.batch_size_local * a.kv_heads
    # The window moves on by one with each token of the step.
    keys = kv_len if a.window is None else min(kv_len, a.window + w.q_len - 1)
    operators: dict[str, Operator] = {
        "q_proj": GemmShape(1, tokens, hidden, width),
        "k_proj": GemmShape(1, tokens, hidden, kv_width),
        "v_proj": GemmShape(1, tokens, hidden, kv_width),
        "attention": AttentionShape(
            B=caches,
            QS=group * w.q_len,
            KS=keys,
            QD=a.head_dim,
            VD=a.head_dim,
            pairs=group * visible_pairs(w.q_len, kv_len, a.window),
            keys=caches * keys,
            query_width=width,
        ),
        "o_proj": GemmShape(1, tokens, width, hidden),
    }
    name = "GQA" if a.window is None else "GQA-window"
    cache = 2 * caches * keys * a.head_dim
    return Layer(name, operators, _weights(operators), cache, arch=dataclasses.asdict(a), count=count)


def _latent(attention: LatentAttention, w: Workload, kv_len: int, count: int, *, as_ds_tpu: bool) -> Layer:
    """Absorbed: queries are brought to the latent space, where one head of keys and values serves them all.

    DS_TPU charges w_vc, which brings the heads' results back, with the extents of w_kc: K is the head's, N the latent
    width. The weights and FLOPs are the same, the rows read and written are not.
    """
    a, hidden, tokens = attention, w.hidden_size, w.local_tokens
    query_width = a.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    kept = a.kv_lora_rank + a.qk_rope_head_dim
    cached = w.batch_size_local * kv_len
    if a.index is None:  # a sequence's tokens see the same keys
        caches, rows, seen = w.batch_size_local, a.heads * w.q_len, kv_len
        pairs = a.heads * visible_pairs(w.q_len, kv_len)
    else:  # every token has keys of its own; `pairs` are those of the mean token
        caches, rows, seen = tokens, a.heads, min(a.index.top_k, kv_len)
        pairs = a.heads * visible_pairs(w.q_len, kv_len, a.index.top_k) // w.q_len
    back = (a.v_head_dim, a.kv_lora_rank) if as_ds_tpu else (a.kv_lora_rank, a.v_head_dim)
    operators: dict[str, Operator] = {
        "q_a_proj": GemmShape(1, tokens, hidden, a.q_lora_rank),
        "q_b_proj": GemmShape(1, tokens, a.q_lora_rank, query_width),
        "kv_a_proj": GemmShape(1, tokens, hidden, kept),
        "w_kc": GemmShape(a.heads, tokens, a.qk_nope_head_dim, a.kv_lora_rank),
        "attention": AttentionShape(
            B=caches,
            QS=rows,
            KS=seen,
            QD=kept,
            VD=a.kv_lora_rank,
            pairs=pairs,
            keys=min(caches * seen, cached),
            query_width=query_width,
            latent=True,
        ),
        "w_vc": GemmShape(a.heads, tokens, *back),
        "o_proj": GemmShape(1, tokens, a.heads * a.v_head_dim, hidden),
    }
    arch = {name: value for name, value in dataclasses.asdict(a).items() if name != "index"}
    return Layer("MLA", operators, _weights(operators), cached * kept, arch, count)


def _index(index: SparseIndex, q_lora_rank: int, w: Workload, kv_len: int, count: int) -> Layer:
    """What chooses the keys: the scores of every query with every key, and no values.

    DS_TPU takes half of a key's width for a value's, so that the scores alone cost the FLOPs and bytes of whole keys.
    """
    tokens, cached, width = w.local_tokens, w.batch_size_local * kv_len, index.heads * index.head_dim
    operators: dict[str, Operator] = {
        "wq_b": GemmShape(1, tokens, q_lora_rank, width),
        "wk": GemmShape(1, tokens, w.hidden_size, index.head_dim),
        "weights_proj": GemmShape(1, tokens, w.hidden_size, index.heads),
        "index": AttentionShape(
            B=w.batch_size_local,
            QS=index.heads * w.q_len,
            KS=kv_len,
            QD=index.head_dim // 2,
            VD=index.head_dim // 2,
            pairs=index.heads * visible_pairs(w.q_len, kv_len),
            keys=cached,
            query_width=width,
        ),
    }
    return Layer("DSA", operators, _weights(operators), cached * index.head_dim, dataclasses.asdict(index), count)


def visible_pairs(q_len: int, kv_len: int, window: int | None = None) -> int:
    """Pairs of one of the last `q_len` tokens of `kv_len` and a key that it sees: all up to itself, or the window's."""
    first = kv_len - q_len + 1  # keys of the first of them
    limit = kv_len if window is None else window
    growing = min(max(limit - first, 0), q_len)  # tokens that see fewer than the limit
    return growing * (2 * first + growing - 1) // 2 + (q_len - growing) * min(limit, kv_len)
