"""Modelled times of a layer and of a whole step: DS_TPU's model on the chips made for it, the roofline on all others.

    workload = moe_workload(config, batch_size=1536, ep=32)
    model_layer(get_chip("h200"), workload).elapsed                                            # one layer of experts
    model_step(get_chip("v32-run"), workload, get_decoder("deepseek-v3.2"), kv_len=8192).tps   # the whole model

DS_TPU counts the mean rows of a chip; the roofline counts the busiest chip's, as that is the one that the others wait
for. Operators run one after the other.
"""

import dataclasses
from typing import Any, Literal

from bench.model.decoders import Decoder
from bench.model.ds_tpu import evaluate_exchange, evaluate_gemm, evaluate_lookup
from bench.model.ds_tpu_attention import evaluate_attention
from bench.model.layers import Attend, Exchange, Layer, Lookup, Operator, Product, moe_layer, step_layers
from bench.model.operator_time import OperatorTime
from bench.model.roofline import roofline_attention, roofline_exchange, roofline_gemm
from bench.model.shapes import OPERAND_DTYPES, GemmShape
from bench.model.workloads import Workload
from pallas_kernels.chips import Chip

Bound = Literal["compute", "memory", "link"]


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Modelled times of one layer on the busiest chip.

    Attributes:
      layer: what was modelled, and how often the model has it.
      operators: in order of execution.
    """

    layer: Layer
    operators: tuple[OperatorTime, ...]

    def total(self, field: str) -> Any:
        """The sum over the operators of one of their figures."""
        return sum(getattr(operator, field) for operator in self.operators)

    @property
    def elapsed(self) -> float:
        """µs of one such layer."""
        return self.total("elapsed")

    @property
    def comm_elapsed(self) -> float:
        """µs of dispatch and combine, part of `elapsed`."""
        return sum(operator.elapsed for operator in self.operators if operator.comm_size)

    @property
    def bound(self) -> Bound:
        """What would take longest by itself."""
        return _bound(self)


@dataclasses.dataclass(frozen=True)
class StepTime:
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
        return "ds_tpu" if self.chip.kind == "ds_tpu" else "roofline"

    @property
    def operators(self) -> tuple[OperatorTime, ...]:
        """Those of every kind of layer, once."""
        return tuple(operator for time in self.layers for operator in time.operators)

    def total(self, field: str) -> Any:
        """The sum over all layers of one of their operators' figures."""
        return sum(time.layer.count * time.total(field) for time in self.layers)

    @property
    def elapsed(self) -> float:
        """µs of the step."""
        return sum(time.layer.count * time.elapsed for time in self.layers)

    @property
    def comm_elapsed(self) -> float:
        """µs of dispatch and combine, part of `elapsed`."""
        return sum(time.layer.count * time.comm_elapsed for time in self.layers)

    @property
    def bound(self) -> Bound:
        """What would take longest by itself."""
        return _bound(self)

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


def _bound(time: LayerTime | StepTime) -> Bound:
    fields: dict[Bound, str] = {"compute": "comp_elapsed", "memory": "dma_elapsed", "link": "link_elapsed"}
    return max(fields, key=lambda bound: time.total(fields[bound]))


def model_step(chip: Chip, workload: Workload, decoder: Decoder, kv_len: int) -> StepTime:
    """Times of every layer of a whole model; `kv_len` and errors as in `step_layers`, and as in `model_operator`."""
    layers = step_layers(decoder, workload, kv_len, busiest=chip.kind != "ds_tpu")
    return StepTime(chip, workload, tuple(_layer_time(chip, workload, layer) for layer in layers), kv_len)


def model_layer(chip: Chip, workload: Workload, *, grad: bool = False) -> StepTime:
    """Times of one layer of experts and nothing else.

    With `grad` the operators of the gradients, all in BF16, follow each operator. Errors as in `model_operator`.
    """
    layer = moe_layer(workload, busiest=chip.kind != "ds_tpu")
    return StepTime(chip, workload, (_layer_time(chip, workload, layer, grad=grad),))


def _layer_time(chip: Chip, workload: Workload, layer: Layer, *, grad: bool = False) -> LayerTime:
    times = []
    for operator in layer.operators:
        times.append(model_operator(chip, operator, workload.dtype, workload.ep))
        if grad:
            times += [
                model_operator(chip, gradient, "bf16", workload.ep) for gradient in _gradients(operator, workload)
            ]
    return LayerTime(layer, tuple(times))


def _gradients(operator: Operator, workload: Workload) -> list[Operator]:
    """What the backward pass adds to a product or an exchange."""
    if isinstance(operator, Product):  # of the rows and of the weights
        g, m, k, n = dataclasses.astuple(operator.shape)
        return [Product(f"{operator.name}_grad", GemmShape(*shape)) for shape in ((g, m, k, n), (g, k, m, n))]
    if isinstance(operator, Exchange):  # that of dispatch travels as combine does, in BF16, and that of combine as well
        return [Exchange(operator.kind, workload.combine_bytes)]
    raise NotImplementedError(operator)


def model_operator(chip: Chip, operator: Operator, dtype: str, ep: int) -> OperatorTime:
    """Time of one operator, by the model that fits the chip; an exchange is over `ep` chips.

    Raises:
      ValueError: dtype is not "fp8", "int8", "bf16" or "fp16"; rows travel over links of unknown bandwidth; or no
        tile fits the chip.
    """
    is_ds_tpu = chip.kind == "ds_tpu"
    match operator:
        case Product(name, shape):
            return model_gemm(chip, shape, dtype, name)
        case Attend(name, shape):
            return (evaluate_attention if is_ds_tpu else roofline_attention)(chip, shape, dtype, name)
        case Exchange(kind, num_bytes):
            return (
                evaluate_exchange(chip, kind, num_bytes) if is_ds_tpu else roofline_exchange(chip, kind, num_bytes, ep)
            )
        case Lookup(rows, width, table):
            return evaluate_lookup(chip, rows, width, table)


def model_gemm(chip: Chip, shape: GemmShape, dtype: str, name: str = "gemm") -> OperatorTime:
    """Time of one grouped GEMM with a BF16 output, by the model that fits the chip.

    Raises:
      ValueError: dtype is not "fp8", "int8", "bf16" or "fp16".
    """
    model = evaluate_gemm if chip.kind == "ds_tpu" else roofline_gemm
    return model(chip, shape, dtype, name=name)
