"""Kernels that start beside the one before them: what a `Prefetch` may say, and where the kernels wait."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.on_gpu.prefetch import Prefetch, alone, prefetching
from pallas_kernels.quantize import QTensor
from pallas_kernels.rms_norm.gpu import rms_norm
from tests.helpers import raises_saying

EARLY = [
    Prefetch("pdl"),
    Prefetch("pdl", overlap=1.0),
    Prefetch("l2", overlap=0.5, prefetch=1.0),
    Prefetch("smem", overlap=0.0, prefetch=0.5),
    Prefetch("smem", overlap=1.0, prefetch=1.0),
]
TOUCHING = {"get", "swap", "load", "copy_gmem_to_smem", "copy_smem_to_gmem"}
"""What reads or writes memory; the result is stored by the last, or by `swap`."""


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (("early",), ["mode", "none, pdl, l2, smem", "'early'"]),
        (("pdl", 1.5), ["overlap", "[0, 1]", "1.5"]),
        (("smem", 1.0, -0.1), ["prefetch", "[0, 1]", "-0.1"]),
        (("none", 0.5), ["overlap", "pdl, l2 or smem", "none"]),
        (("pdl", 0.5, 0.5), ["prefetch", "l2 or smem", "pdl"]),
    ],
)
def test_what_is_refused(fields, parts):
    with raises_saying(ValueError, *parts):
        Prefetch(*fields)


def test_ratios_in_pieces():
    assert [Prefetch("smem", prefetch=share).ahead(6) for share in (None, 0.0, 0.5, 1.0)] == [0, 0, 3, 6]
    assert [Prefetch("pdl", overlap=share).begun(8) for share in (None, 0.0, 0.75, 1.0)] == [None, 8, 2, 0]


def product(num_groups=8, rows=48):
    def in_8_bits(*shape):
        scale = jax.ShapeDtypeStruct((*shape[:-1], 1), "float32")
        return QTensor(jax.ShapeDtypeStruct(shape, "float8_e4m3fn"), scale)

    def run(lhs, rhs, sizes, offset):
        return gpu.grouped_matmul(
            lhs, rhs, sizes, bias=None, group_offset=offset, transpose_rhs=True, out_dtype="bfloat16"
        )

    sizes, offset = jax.ShapeDtypeStruct((num_groups,), "int32"), jax.ShapeDtypeStruct((), "int32")
    return run, in_8_bits(num_groups * rows, 7168), in_8_bits(num_groups, 2048, 7168), sizes, offset


def norm(rows=16):
    def run(x, weight):
        return rms_norm(x, weight, None, eps=1e-6, out_dtype=x.dtype, scaling=None, with_sum=False)

    return run, jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096,), jnp.float32)


CASES = {"product": product, "fewer rows than groups": lambda: product(256, 1), "norm": norm}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefetch", EARLY, ids=str)
@pytest.mark.quick("*smem*1.0*product")
def test_each_warpgroup_waits_once_before_it_touches_anything_but_weights(prefetch, case):
    """On every path: a wait stands in no loop and in no branch but that of the warpgroup."""
    with prefetching(prefetch):
        kernel = kernel_of(*CASES[case]())
    warpgroups = 1 if case == "norm" else 2
    assert count(kernel)["griddepcontrol_wait"] == warpgroups
    bodies = [kernel]
    if warpgroups > 1:
        branches = [inner for eqn in kernel.eqns if eqn.primitive.name == "cond" for inner in inner_jaxprs(eqn)]
        bodies = [body for body in branches if body.eqns]
        outside = [eqn for eqn in kernel.eqns if eqn.primitive.name != "cond"]
        assert not any(TOUCHING & count_eqn(eqn).keys() for eqn in outside)
    assert len(bodies) == warpgroups
    for body in bodies:
        names = [eqn.primitive.name for eqn in body.eqns]
        assert names.count("griddepcontrol_wait") == 1
        wait = names.index("griddepcontrol_wait")
        before = sum((count_eqn(eqn) for eqn in body.eqns[:wait]), collections.Counter())
        touched = TOUCHING & before.keys()
        assert "griddepcontrol_launch_dependents" not in before
        if prefetch.mode != "smem":
            assert not touched
        elif case != "norm":
            assert touched <= {"copy_gmem_to_smem"}  # whose source is the guess of `Loader.fetch_ahead`
            assert read_by_copies(body.eqns[:wait]) <= {"float8_e4m3fn[8,2048,7168]", "float8_e4m3fn[256,2048,7168]"}
        else:
            assert touched <= {"get", "load"}


@pytest.mark.parametrize("case", CASES)
def test_a_plain_launch_neither_waits_nor_allows(case):
    plain = kernel_of(*CASES[case]())
    assert not [name for name in count(plain) if "griddepcontrol" in name]
    with prefetching(EARLY[-1]), alone(True):
        assert not [name for name in count(kernel_of(*CASES[case]())) if "griddepcontrol" in name]


def test_weights_that_cannot_be_guessed_come_after_the_wait():
    with prefetching(EARLY[-1]):
        kernel = kernel_of(*product(rows=4096))
    waiting = [inner.eqns for eqn in kernel.eqns for inner in inner_jaxprs(eqn) if count(inner)["griddepcontrol_wait"]]
    assert len(waiting) == 2
    for eqns in waiting:
        wait = [eqn.primitive.name for eqn in eqns].index("griddepcontrol_wait")
        assert not any(TOUCHING & count_eqn(eqn).keys() for eqn in eqns[:wait])


def kernel_of(function, *args):
    """The jaxpr of the one kernel in a function."""

    def bodies(jaxpr):
        for eqn in jaxpr.eqns:
            for inner in inner_jaxprs(eqn):
                yield from [inner] if eqn.primitive.name == "mpmd_map" else bodies(inner)

    (body,) = bodies(jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr)  # a function that no cache knows
    if [eqn.primitive.name for eqn in body.eqns] == ["run_scoped"]:  # shared memory
        body = body.eqns[0].params["jaxpr"]
    return body


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def count_eqn(eqn):
    return sum((count(inner) for inner in inner_jaxprs(eqn)), collections.Counter([eqn.primitive.name]))


def count(jaxpr):
    return sum((count_eqn(eqn) for eqn in jaxpr.eqns), collections.Counter())


def read_by_copies(eqns):
    """The arrays in global memory from which equations copy."""
    found = set()
    for eqn in eqns:
        if eqn.primitive.name == "copy_gmem_to_smem":
            found.add(jnp.dtype(eqn.invars[0].aval.dtype).name + str(list(eqn.invars[0].aval.shape)).replace(" ", ""))
        for inner in inner_jaxprs(eqn):
            found |= read_by_copies(inner.eqns)
    return found
