import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chips import CHIPS, Chip, chip_of, ds_tpu_chip, get_chip
from tests.helpers import raises_saying

NAMES = ["v5e", "v5p", "v6e", "v7x", "h100", "h200", "b200", "seed", "tier6", "v32-run"]
TPUS = ["v5e", "v5p", "v6e", "v7x"]


def test_names():
    assert list(CHIPS) == NAMES
    for name, chip in CHIPS.items():
        assert get_chip(name) is get_chip(name.upper()) is chip
        assert chip.name == name


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_filled_in(name):
    chip = get_chip(name)
    assert chip.source
    assert chip.cores >= 1
    figures = [chip.hbm_bandwidth, chip.hbm_bytes, chip.link_bandwidth, chip.fast_memory_bytes]
    assert all(figure > 0 for figure in [*figures, *chip.peak_flops.values()])
    assert "bfloat16" in chip.peak_flops
    assert all(jnp.dtype(dtype).name == dtype for dtype in chip.peak_flops)
    assert chip.hbm_bandwidth > chip.link_bandwidth


def test_generations():
    assert [chip.generation for chip in CHIPS.values()] == [*TPUS, "hopper", "hopper", "blackwell", *["ds_tpu"] * 3]
    assert get_chip("cores=64,tflops=768,gbps=8601.6").generation == "ds_tpu"


def test_rows_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_chip("h200").cores = 1
    with pytest.raises(TypeError):
        get_chip("h200").peak_flops["bfloat16"] = 1.0
    with pytest.raises(TypeError):
        CHIPS["mine"] = get_chip("h200")


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_tpus_before_v7x_multiply_int8_but_not_e4m3fn(name):
    chip = get_chip(name)
    assert chip.is_native("int8")
    assert chip.is_native("float8_e4m3b11fnuz")
    assert chip.is_native(jnp.float8_e5m2)
    assert not chip.is_native(jnp.float8_e4m3fn)
    assert chip.peak("int8") == 2 * chip.peak("bfloat16")
    assert chip.peak("float8_e4m3fn") == chip.peak("bfloat16")


def test_v7x_multiplies_e4m3fn_but_not_int8():
    chip = get_chip("v7x")
    assert chip.is_native("float8_e4m3fn")
    assert chip.is_native("float8_e5m2")
    assert not chip.is_native("int8")
    assert chip.peak("float8_e4m3fn") == 2 * chip.peak("bfloat16")
    assert chip.peak("int8") == chip.peak("bfloat16")


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_gpus_multiply_both_fp8s_and_int8_at_twice_the_rate(name):
    chip = get_chip(name)
    for dtype in ("float8_e4m3fn", "float8_e5m2", "int8"):
        assert chip.is_native(dtype)
        assert chip.peak(dtype) == pytest.approx(2 * chip.peak("bfloat16"), rel=1e-3)
    assert chip.peak("float16") == chip.peak("bfloat16")


def test_float32_without_a_figure_counts_half_of_bfloat16():
    assert get_chip("v6e").peak("float32") == get_chip("v6e").peak("bfloat16") / 2
    assert get_chip("h200").peak("float32") == pytest.approx(66.9e12)


def jax_tpu_info(chip: Chip):
    """jax's own row for a TPU, per core, or a skip where jax has moved it."""
    try:
        from jax._src import tpu_info

        version = tpu_info.chip_version_from_device_kind(chip.device_kinds[0])
        return tpu_info.get_tpu_info_for_chip(version, 1)
    except (ImportError, AttributeError, TypeError) as reason:
        pytest.skip(f"jax has no TPU figures where they used to be: {reason}")


@pytest.mark.parametrize("name", TPUS)
def test_tpu_figures_agree_with_jax(name):
    chip = get_chip(name)
    info = jax_tpu_info(chip)
    # The documentation of v5p gives 2765 GB/s, jax gives 2460.
    bandwidth = dict(rel=0.13 if name == "v5p" else 0.05)
    assert chip.hbm_bandwidth == pytest.approx(info.mem_bw_bytes_per_second * chip.cores, **bandwidth)
    assert chip.hbm_bytes == pytest.approx(info.hbm_capacity_bytes * chip.cores, rel=0.05)
    assert chip.fast_memory_bytes == info.vmem_capacity_bytes
    assert chip.matrix_unit == info.mxu_column_size
    assert chip.cores == info.chip_version.num_physical_tensor_cores_per_chip
    peaks = {
        "bfloat16": info.bf16_ops_per_second,
        "int8": info.int8_ops_per_second,
        "float8_e5m2": info.fp8_ops_per_second,
    }
    for dtype, per_core in peaks.items():
        if per_core:  # 0 where jax does not know
            assert chip.peak(dtype) == pytest.approx(per_core * chip.cores, rel=0.05)


@pytest.mark.parametrize("name", TPUS)
def test_native_dtypes_agree_with_jax(name):
    chip = get_chip(name)
    info = jax_tpu_info(chip)
    for dtype in ("bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"):
        assert chip.is_native(dtype) == info.is_matmul_supported(dtype, dtype), dtype


def test_a_described_chip():
    chip = get_chip("cores=64,tflops=768,gbps=8601.6,link=448")
    assert (chip.kind, chip.cores, chip.hbm_bandwidth) == ("ds_tpu", 64, 8601.6e9)
    for dtype in ("bfloat16", "float8_e4m3fn", "int8"):
        assert chip.peak(dtype) == 768e12
    v32 = get_chip("v32-run")
    same_but = dict(name=v32.name, source=v32.source)
    assert dataclasses.replace(chip, **same_but) == v32
    assert get_chip(" tflops=768, cores=64 ,gbps=8601.6").peak_flops == chip.peak_flops


def test_a_description_may_leave_out_the_links():
    assert get_chip("cores=64,tflops=768,gbps=8601.6,link=448").link() == get_chip("v32-run").link() == 448e9
    chip = get_chip("cores=64,tflops=768,gbps=8601.6")
    assert chip.link_bandwidth is None
    with raises_saying(ValueError, "'cores=64,tflops=768,gbps=8601.6' has no link figure", "gbps=8601.6,link=448"):
        chip.link()


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("h300", ["'h300'", "v5e", "v32-run", "cores=64,tflops=768,gbps=8601.6,link=448"]),
        ("", ["''", "expected one of"]),
        ("cores=64,tflops=768", ["lacks gbps"]),
        ("gbps=1", ["lacks cores, tflops"]),
        ("cores=64,tflops=768,gbps=8601.6,sram=2", ["unknown field 'sram'"]),
        ("cores=64,tflops=768,gbps=8601.6,", ["unknown field ''"]),
        ("cores=64,cores=32,tflops=768,gbps=8601.6", ["cores twice"]),
        ("cores=x,tflops=768,gbps=8601.6", ["cores must be a", "'x'"]),
        ("cores=0,tflops=768,gbps=8601.6", ["cores must be a", "'0'"]),
        ("cores=1.5,tflops=768,gbps=8601.6", ["cores must be a", "'1.5'"]),
        ("cores=64,tflops=-1,gbps=8601.6", ["tflops must be a", "'-1'"]),
        ("cores=64,tflops=768,gbps=inf", ["gbps must be a", "'inf'"]),
        ("cores=5000,tflops=768,gbps=8601.6", ["cores must be a whole number from 1 to 4096", "'5000'"]),
        ("cores=64,tflops=1e308,gbps=8601.6", ["tflops must be a number from 1e-09 to 1e+09", "'1e308'"]),
        ("cores=64,tflops=768,gbps=8601.6,link=0", ["link must be a", "'0'"]),
        ("cores=64,tflops=nan,gbps=1", ["tflops must be a", "'nan'"]),
    ],
)
def test_bad_names_and_descriptions(spec, parts):
    with raises_saying(ValueError, *parts):
        get_chip(spec)
    if "=" in spec:
        with raises_saying(ValueError, repr(spec), "'cores=64,tflops=768,gbps=8601.6,link=448'"):
            get_chip(spec)


def test_ds_tpu_chip():
    chip = ds_tpu_chip("mine", 8, 100, 1000, "a test")
    assert (chip.name, chip.cores, chip.hbm_bandwidth, chip.source) == ("mine", 8, 1e12, "a test")
    assert chip.fast_memory_bytes == 2 << 20


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "h200")]
)
def test_chip_of_a_device(kind, name):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) is CHIPS[name]


def test_a_cpu_is_no_chip():
    assert chip_of(jax.devices("cpu")[0]) is None


def test_device_kinds_are_unambiguous():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
