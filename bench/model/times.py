"""Modelled times of a layer and of a whole step: DS_TPU's model on the chips made for it, the roofline on all others.

    workload = moe_workload(config, batch_size=1536, ep=32)
    model_layer(get_chip("h200"), workload).elapsed                                            # one layer of experts
    model_step(get_chip("v32-run"), workload, get_decoder("deepseek-v3.2"), kv_len=8192).tps   # the whole model

DS_TPU counts the mean rows of a chip; the roofline counts the busiest chip's, as that is the one that the others wait
for. Operators run one after the other.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, override

from bench.model.decoders import Decoder
from bench.model.ds_tpu import evaluate_exchange, evaluate_gemm, evaluate_lookup
from bench.model.ds_tpu_attention import evaluate_attention
from bench.model.layers import Exchange, Layer, Lookup, Operator, moe_layer, step_layers
from bench.model.operator_time import OperatorTime
from bench.model.roofline import roofline_attention, roofline_exchange, roofline_gemm
from bench.model.shapes import OPERAND_DTYPES, AttentionShape, GemmShape
from bench.model.workloads import Workload
from pallas_kernels.chips import Chip

Bound = Literal["compute", "memory", "link"]


class _Sums:
    """What the times of a layer and of a step have in common: they are sums over operators."""

    def total(self, field: str) -> Any:
        """The sum over the operators of one of their figures."""
        raise NotImplementedError

    @property
    def elapsed(self) -> float:
        """µs from start to end."""
        return self.total("elapsed")

    @property
    def comm_elapsed(self) -> float:
        """µs of dispatch and combine, part of `elapsed`."""
        return self.total("comm_elapsed")

    @property
    def bound(self) -> Bound:
        """What would take longest by itself."""
        fields: dict[Bound, str] = {"compute": "comp_elapsed", "memory": "dma_elapsed", "link": "link_elapsed"}
        return max(fields, key=lambda bound: self.total(fields[bound]))


@dataclasses.dataclass(frozen=True)
class LayerTime(_Sums):
    """Modelled times of one layer on the busiest chip.

    Attributes:
      layer: what was modelled, and how often the model has it.
      operators: in order of execution.
    """

    layer: Layer
    operators: tuple[OperatorTime, ...]

    @override
    def total(self, field: str) -> Any:
        return sum(getattr(operator, field) for operator in self.operators)


@dataclasses.dataclass(frozen=True)
class StepTime(_Sums):
    """Modelled times of a step: all tokens of a batch through some layers, on the busiest chip.

    Attributes:
      chip: what was modelled.
      workload: the layer of experts, the batch, and its spread over chips.
      layers: one of each kind, in order of first use.
      kv_len: tokens of each sequence that a query may see; None where no layer attends.
    """

    chip: Chip
    workload: Workload
    layers: tuple[LayerTime, ...]
    kv_len: int | None = None

    @property
    def model(self) -> Literal["ds_tpu", "roofline"]:
        """The model that fits the chip."""
        return "ds_tpu" if is_ds_tpu(self.chip) else "roofline"

    @property
    def operators(self) -> tuple[OperatorTime, ...]:
        """Those of every kind of layer, once."""
        return tuple(operator for time in self.layers for operator in time.operators)

    @override
    def total(self, field: str) -> Any:
        return sum(time.layer.count * time.total(field) for time in self.layers)

    @property
    def tps(self) -> float:
        """Tokens/s of all chips."""
        return self.workload.batch_size * self.workload.q_len / (self.elapsed * 1e-6)

    @property
    def tps_per_batch(self) -> float:
        """Tokens/s of one sequence."""
        return self.tps / self.workload.batch_size

    @property
    def tps_per_chip(self) -> float:
        """Tokens/s of one chip."""
        return self.tps / self.workload.num_chips

    @property
    def mfu(self) -> float:
        """One chip's unpadded FLOPs over what its peak does in the time, as DS_TPU counts.

        DS_TPU charges the embedding, which is a lookup and no arithmetic, with as many FLOPs as the head.
        """
        return self._utilisation(self.total("flops"))

    @property
    def mfu_without_lookup(self) -> float:
        """The same without the FLOPs that the lookup does not do."""
        lookups = sum(operator.flops for operator in self.operators if operator.kind == "lookup")
        return self._utilisation(self.total("flops") - lookups)

    def _utilisation(self, flops: int) -> float:
        return flops / (self.elapsed * 1e-6 * self.chip.peak(OPERAND_DTYPES[self.workload.dtype]))

    @property
    def weight_bytes(self) -> int:
        """What a chip keeps of all weights, in the operands' dtype."""
        return self._bytes(sum(time.layer.count * time.layer.weights for time in self.layers))

    @property
    def cache_bytes(self) -> int:
        """What it keeps of earlier tokens, in the operands' dtype."""
        return self._bytes(sum(time.layer.count * time.layer.cache for time in self.layers))

    def _bytes(self, elements: int) -> int:
        return elements * OPERAND_DTYPES[self.workload.dtype].itemsize

    @property
    def fits(self) -> bool:
        """Whether the chip's memory holds both."""
        return self.weight_bytes + self.cache_bytes <= self.chip.hbm_bytes


def model_step(chip: Chip, workload: Workload, decoder: Decoder, kv_len: int) -> StepTime:
    """Times of every layer of a whole model; `kv_len` and errors as in `step_layers`, and as in `model_operator`."""
    layers = step_layers(decoder, workload, kv_len, as_ds_tpu=is_ds_tpu(chip))
    return StepTime(chip, workload, tuple(_layer_time(chip, workload, layer) for layer in layers), kv_len)


def model_layer(chip: Chip, workload: Workload, *, grad: bool = False) -> StepTime:
    """Times of one layer of experts and nothing else.

    With `grad` the operators of the gradients, all in BF16, follow each operator. Errors as in `model_operator`.
    """
    layer = moe_layer(workload, as_ds_tpu=is_ds_tpu(chip))
    return StepTime(chip, workload, (_layer_time(chip, workload, layer, grad=grad),))


def _layer_time(chip: Chip, workload: Workload, layer: Layer, *, grad: bool = False) -> LayerTime:
    times = []
    for name, operator in layer.operators.items():
        times.append(model_operator(chip, name, operator, workload.dtype, workload.ep))
        if grad:
            times += (model_operator(chip, *each, "bf16", workload.ep) for each in _gradients(name, operator, layer))
    return LayerTime(layer, tuple(times))


def _gradients(name: str, operator: Operator, layer: Layer) -> Iterator[tuple[str, Operator]]:
    """What the backward pass adds to a product or an exchange of a layer of experts."""
    match operator:
        case GemmShape(g, m, k, n):
            yield f"{name}_grad", GemmShape(g, m, n, k)  # of the rows: the result's gradient times Bᵀ
            yield f"{name}_grad", GemmShape(g, k, m, n)  # of the weights: Aᵀ times the result's gradient
        case Exchange(kind):  # that of dispatch travels as combine does, in BF16, and that of combine as well
            combine = layer.operators["combine"]
            assert isinstance(combine, Exchange)
            yield name, Exchange(kind, combine.num_bytes)
        case _:
            raise NotImplementedError(operator)


def model_operator(chip: Chip, name: str, operator: Operator, dtype: str, ep: int) -> OperatorTime:
    """Time of one operator, by the model that fits the chip; an exchange is over `ep` chips.

    Raises:
      ValueError: dtype is not "fp8", "int8", "bf16" or "fp16"; rows travel over links of unknown bandwidth; or no
        tile fits the chip.
    """
    match operator:
        case GemmShape():
            return model_gemm(chip, operator, dtype, name)
        case AttentionShape():
            return (evaluate_attention if is_ds_tpu(chip) else roofline_attention)(chip, operator, dtype, name)
        case Exchange(kind, num_bytes) if is_ds_tpu(chip):
            return evaluate_exchange(chip, kind, num_bytes)
        case Exchange(kind, num_bytes):
            return roofline_exchange(chip, kind, num_bytes, ep)
        case Lookup(rows, width, table):  # nothing but bytes, on which both models agree
            return evaluate_lookup(chip, rows, width, table)


def model_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """Time of one grouped GEMM with a BF16 output, by the model that fits the chip.

    Raises:
      ValueError: dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    return (evaluate_gemm if is_ds_tpu(chip) else roofline_gemm)(chip, shape, dtype, name)


def is_ds_tpu(chip: Chip) -> bool:
    """Whether DS_TPU's model fits the chip, and otherwise the roofline."""
    return chip.kind == "ds_tpu"
