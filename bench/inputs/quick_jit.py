"""Programs that make what is measured, compiled quickly rather than to run quickly.

On an NVIDIA GPU XLA searches for the fastest kernel of every product, for which it compiles dozens: 10 to 20 s for the
activations of a load, which take the GPU a millisecond to make.
"""

import functools
from collections.abc import Callable, Sequence

import jax

from bench.measure.clock import is_nvidia

_WITHOUT_SEARCH = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def quick_jit[**P, Result](
    function: Callable[P, Result], *, static_argnames: Sequence[str] = ()
) -> Callable[P, Result]:
    """`function`, jitted without that search."""

    @functools.cache
    def jitted() -> Callable[P, Result]:
        options = _WITHOUT_SEARCH if is_nvidia(jax.devices()[0]) else None
        return jax.jit(function, static_argnames=static_argnames, compiler_options=options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        return jitted()(*args, **kwargs)

    return call
