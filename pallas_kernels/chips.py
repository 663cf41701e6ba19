"""The chips that kernels are tiled for and costs are modelled on.

One row a chip: peak arithmetic per operand dtype, memory and link bandwidth, fast on-chip memory, and which operand
dtypes the matrix unit takes without a conversion. Every figure is per chip (not per core), dense (no sparsity), and
comes from the source named in the row.

    chip = get_chip("h200")
    chip.peak("float8_e4m3fn")        # 1.979e15 FLOP/s
    chip.is_native("int8")            # True
    get_chip("cores=64,tflops=768,gbps=8601.6")   # a DS_TPU-like chip that has no name
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

MIB = 1 << 20
KIB = 1 << 10
GIB = 1 << 30
GB = 10**9
TERA = 10**12

Generation = Literal["v5e", "v5p", "v6e", "v7x", "hopper", "blackwell", "ds_tpu"]
"""Chips of one generation run the same kernels, each cut for its own figures."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do in a second, and how much it can hold.

    Attributes:
      name: the key under which `get_chip` finds it.
      kind: "tpu", "gpu", or "ds_tpu" for the modelled chips of the DS_TPU evaluator.
      generation: which kernels it runs; of a TPU its name.
      cores: independent cores (TensorCores, streaming multiprocessors, DS_TPU cores) that share the chip's figures.
      peak_flops: FLOP/s of the whole chip for each operand dtype that its matrix unit multiplies natively.
      hbm_bandwidth: bytes/s between main memory and the chip.
      hbm_bytes: capacity of main memory in bytes.
      link_bandwidth: bytes/s that the chip can send to its peers (one direction, all links together), None if unknown.
      fast_memory_bytes: software-managed on-chip memory of one core in bytes (VMEM, shared memory, SRAM).
      device_kinds: the strings that `jax.Device.device_kind` shows for this chip.
      jax_devices: JAX devices that one chip is; its TensorCores are shared out evenly.
      matrix_unit: rows (and as many columns) of the weights that a systolic matrix unit holds; None without one.
      source: where the figures come from.
    """

    name: str
    kind: Literal["tpu", "gpu", "ds_tpu"]
    generation: Generation
    cores: int
    peak_flops: Mapping[str, float]
    hbm_bandwidth: float
    hbm_bytes: float
    link_bandwidth: float | None
    fast_memory_bytes: int
    source: str
    device_kinds: tuple[str, ...] = ()
    jax_devices: int = 1
    matrix_unit: int | None = None

    def is_native(self, dtype: jax.typing.DTypeLike) -> bool:
        """Whether the matrix unit multiplies operands of `dtype` without converting them first."""
        return jnp.dtype(dtype).name in self.peak_flops

    def peak(self, dtype: jax.typing.DTypeLike) -> float:
        """FLOP/s for operands of `dtype`.

        A dtype that the matrix unit does not take is converted before the multiplication: to bfloat16 when it is
        narrower, and so it runs at the bfloat16 rate and saves bytes only. float32 operands are counted at half the
        bfloat16 rate unless the chip states its own figure.
        """
        name = jnp.dtype(dtype).name
        if name in self.peak_flops:
            return self.peak_flops[name]
        bfloat16 = self.peak_flops["bfloat16"]
        return bfloat16 / 2 if jnp.dtype(dtype).itemsize > 2 else bfloat16

    def link(self) -> float:
        """`link_bandwidth`, where something has to travel.

        Raises:
          ValueError: it is not known.
        """
        if self.link_bandwidth is None:
            raise ValueError(
                f"chip {self.name!r} has no link figure, and tokens travel to other chips; add one in GB/s: "
                f"{self.name},link=448"
            )
        return self.link_bandwidth


def _rates(**tflops: float) -> Mapping[str, float]:
    return MappingProxyType({dtype: rate * TERA for dtype, rate in tflops.items()})


def _tpu(name: Literal["v5e", "v5p", "v6e", "v7x"], **figures) -> Chip:
    return Chip(name=name, kind="tpu", generation=name, **figures)


def _hopper(name: str, hbm_gb: float, hbm_tb_per_s: float, device_kinds: tuple[str, ...], source: str) -> Chip:
    return Chip(
        name=name,
        kind="gpu",
        generation="hopper",
        cores=132,
        peak_flops=_rates(
            float16=989.4, bfloat16=989.4, float8_e4m3fn=1978.9, float8_e5m2=1978.9, int8=1978.9, float32=66.9
        ),
        hbm_bandwidth=hbm_tb_per_s * TERA,
        hbm_bytes=hbm_gb * GB,
        link_bandwidth=450 * GB,
        fast_memory_bytes=227 * KIB,
        device_kinds=device_kinds,
        source=source,
    )


def ds_tpu_chip(name: str, cores: int, tflops: float, gbps: float, source: str, link_gbps: float | None = 448) -> Chip:
    """A chip of the DS_TPU cost model: equal cores, one peak for 8- and 16-bit operands, bandwidths in GB/s."""
    return Chip(
        name=name,
        kind="ds_tpu",
        generation="ds_tpu",
        cores=cores,
        peak_flops=_rates(bfloat16=tflops, float16=tflops, float8_e4m3fn=tflops, float8_e5m2=tflops, int8=tflops),
        hbm_bandwidth=gbps * GB,
        hbm_bytes=float("inf"),
        link_bandwidth=None if link_gbps is None else link_gbps * GB,
        fast_memory_bytes=2 * MIB,
        source=source,
    )


_CLOUD_TPU = "Google Cloud TPU documentation (system architecture), 2026; VMEM from jax's tpu_info"

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _tpu(
                "v5e",
                cores=1,
                peak_flops=_rates(bfloat16=197, int8=394, float8_e5m2=197, float8_e4m3b11fnuz=197),
                hbm_bandwidth=819 * GB,
                hbm_bytes=16 * GIB,
                link_bandwidth=200 * GB,
                fast_memory_bytes=128 * MIB,
                device_kinds=("TPU v5e", "TPU v5 lite"),
                matrix_unit=128,
                source=_CLOUD_TPU,
            ),
            _tpu(
                "v5p",
                cores=2,
                peak_flops=_rates(bfloat16=459, int8=918, float8_e5m2=459, float8_e4m3b11fnuz=459),
                hbm_bandwidth=2765 * GB,
                hbm_bytes=95 * GIB,
                link_bandwidth=600 * GB,
                fast_memory_bytes=64 * MIB,
                device_kinds=("TPU v5", "TPU v5p"),
                matrix_unit=128,
                source=_CLOUD_TPU,
            ),
            _tpu(
                "v6e",
                cores=1,
                peak_flops=_rates(bfloat16=918, int8=1836, float8_e5m2=918, float8_e4m3b11fnuz=918),
                hbm_bandwidth=1640 * GB,
                hbm_bytes=32 * GIB,
                link_bandwidth=400 * GB,
                fast_memory_bytes=128 * MIB,
                device_kinds=("TPU v6e", "TPU v6 lite"),
                matrix_unit=256,
                source=_CLOUD_TPU,
            ),
            _tpu(
                "v7x",
                cores=2,
                peak_flops=_rates(bfloat16=2307, float8_e4m3fn=4614, float8_e5m2=4614),
                hbm_bandwidth=7380 * GB,
                hbm_bytes=192 * GIB,
                link_bandwidth=600 * GB,
                fast_memory_bytes=64 * MIB,
                device_kinds=("TPU7x",),
                jax_devices=2,
                matrix_unit=256,
                source=_CLOUD_TPU,
            ),
            _hopper("h100", 80, 3.35, ("NVIDIA H100 80GB HBM3",), "NVIDIA H100 SXM data sheet"),
            _hopper("h200", 141, 4.8, ("NVIDIA H200",), "NVIDIA H200 SXM data sheet"),
            Chip(
                name="b200",
                kind="gpu",
                generation="blackwell",
                cores=148,
                peak_flops=_rates(
                    float16=2250, bfloat16=2250, float8_e4m3fn=4500, float8_e5m2=4500, int8=4500, float32=80
                ),
                hbm_bandwidth=8 * TERA,
                hbm_bytes=180 * GB,
                link_bandwidth=900 * GB,
                fast_memory_bytes=227 * KIB,
                device_kinds=("NVIDIA B200",),
                source="NVIDIA HGX B200 data sheet",
            ),
            ds_tpu_chip("seed", 64, 786.432, 11468.8, "DS_TPU evaluator, the seed's example"),
            ds_tpu_chip("tier6", 64, 768, 11468.8, "Tier6 evaluator preset"),
            ds_tpu_chip("v32-run", 64, 768, 8601.6, "DS_TPU evaluator, DeepSeek-V3.2 run"),
        )
    }
)


def get_chip(spec: str) -> Chip:
    """The chip called `spec`, or the DS_TPU-like chip that `spec` describes.

    Args:
      spec: a name of `CHIPS`, in any case, or "cores=64,tflops=768,gbps=8601.6,link=448" (of the whole chip: peak in
        TFLOP/s, DRAM bandwidth in GB/s, and, where tokens are to travel, bandwidth to its peers in GB/s).

    Raises:
      ValueError: the name is unknown, or a field of the description is missing, unknown, or out of bounds.
    """
    if "=" in spec:
        return _parse_chip(spec)
    try:
        return CHIPS[spec.lower()]
    except KeyError:
        raise ValueError(
            f"unknown chip {spec!r}; expected one of {', '.join(CHIPS)}, or a description like {_EXAMPLE!r}"
        ) from None


_EXAMPLE = "cores=64,tflops=768,gbps=8601.6,link=448"
_MOST_CORES, _MOST = 4096, 1e9
"""Of cores, and of all other figures: beyond these it is a slip, and the model would search for ever."""


def _parse_chip(spec: str) -> Chip:
    example = f"expected a description like {_EXAMPLE!r}"
    fields: dict[str, float] = {}
    for part in spec.split(","):
        key, _, text = part.strip().partition("=")
        if key not in ("cores", "tflops", "gbps", "link"):
            raise ValueError(f"chip description {spec!r} has an unknown field {key!r}; {example}")
        if key in fields:
            raise ValueError(f"chip description {spec!r} gives {key} twice; {example}")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        is_whole = key == "cores"
        least, most = (1, _MOST_CORES) if is_whole else (1 / _MOST, _MOST)
        if not least <= value <= most or (is_whole and value != int(value)):
            kind = "whole number" if is_whole else "number"
            raise ValueError(
                f"chip description {spec!r}: {key} must be a {kind} from {least:g} to {most:g}, got {text!r}; {example}"
            )
        fields[key] = value
    if missing := [key for key in ("cores", "tflops", "gbps") if key not in fields]:
        raise ValueError(f"chip description {spec!r} lacks {', '.join(missing)}; {example}")
    link = fields.get("link")
    source = "given on the command line"
    return ds_tpu_chip(spec, int(fields["cores"]), fields["tflops"], fields["gbps"], source, link)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that `device` is, or None when no row describes it (a CPU, an unlisted accelerator)."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)
