"""Times a chain of products and norms on the device, each with its own way to start early.

They follow each other in one program, a kernel each, with nothing between them: a barrier that costs no kernel
keeps them in order. Each is lowered once for each value, and put into the programs of all choices as it is.

The host needs longer for a launch than some of the kernels take. So the device is first held up by other work, while
all launches of the chain come to wait in its queue.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax

from bench.hopper import norms, products
from bench.hopper.norms import Norm
from bench.hopper.prefetch_search import Choice
from bench.hopper.products import Product
from bench.measure.clock import copies_of
from bench.measure.errors import describe
from bench.measure.timeline import recorded, spans
from pallas_kernels.on_gpu.prefetch import Prefetch, prefetching

NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
"""For XLA_FLAGS: command buffers drop what lets a kernel start early."""

_COMMAND_BUFFERS: dict[str, str | int | bool] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",  # no barrier is left that keeps the kernels in order
    "xla_enable_command_buffers_during_profiling": True,
}
"""What compiles a program with them all the same."""

_LEAST_REPEATS = 2  # of the products in a chain
_HOLD_WIDTH, _HOLD_PRODUCTS = 8192, 3  # 4 ms on an H200
_KERNELS = "grouped_", "rms_norm"  # begin the names of the chain's kernels

Link = Product | Norm
"""What a chain consists of: each is one kernel."""


def leave_out_command_buffers() -> None:
    """Has XLA use no command buffers in this process; call it before jax looks for devices, which reads XLA_FLAGS."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_COMMAND_BUFFERS}".strip()


class ChainTimer:
    """Gives the span of the chain on the device's time line in µs, for each choice and round.

    Choices are compiled side by side and timed in turn, in alternating order. Those that fail, or whose results are not
    bit for bit those of the first choice of the first call, are left out; `say` takes a line on each.

    Args:
      links: the chain, in order. It goes through them several times, each time with other copies of the inputs
        if they would fit the cache otherwise.
      say: takes a line.
    """

    def __init__(self, links: Sequence[Link], say: Callable[[str], None]):
        self._links, self._say = links, say
        self._inputs = copies_of([jax.block_until_ready(_make_inputs(link)) for link in links])
        self._repeats = max(_LEAST_REPEATS, len(self._inputs))
        self._kernels: dict[tuple[Link, Prefetch], Callable[..., Any]] = {}
        self._programs: dict[tuple[Choice, bool], Callable[..., Any]] = {}
        self._failed: set[tuple[Choice, bool]] = set()
        self._expected: Any = None
        self._held = jnp.zeros((_HOLD_WIDTH, _HOLD_WIDTH), jnp.bfloat16)

    @property
    def num_kernels(self) -> int:
        """Kernels of the chain."""
        return len(self._links) * self._repeats

    def sample(
        self, choices: Sequence[Choice], rounds: int, *, in_command_buffers: bool = False
    ) -> Mapping[Choice, Sequence[float]]:
        """µs of each choice, one for each round.

        Args:
          choices: what to time, those of equal products once.
          rounds: how often.
          in_command_buffers: whether XLA puts the chain into a command buffer.

        Raises:
          ValueError: jax does not run on NVIDIA GPUs, or the time line lacks kernels of the chain.
        """
        programs = self._compiled(choices, in_command_buffers)
        if not programs:
            return {}
        order = [list(programs), list(reversed(programs))]

        jax.block_until_ready(_hold(self._held))  # compiled by now

        def run() -> None:
            for number in range(rounds):
                for choice in order[number % 2]:
                    _hold(self._held)
                    jax.block_until_ready(programs[choice](self._inputs))

        launches = [launch for launch in recorded(run) if launch.name.startswith(_KERNELS)]
        times = iter(spans(launches, self.num_kernels))
        samples: dict[Choice, list[float]] = {choice: [] for choice in programs}
        for number in range(rounds):
            for choice in order[number % 2]:
                samples[choice].append(next(times))
        return samples

    def _compiled(self, choices: Sequence[Choice], in_command_buffers: bool) -> dict[Choice, Callable[..., Any]]:
        keys = [(choice, in_command_buffers) for choice in choices]
        new = [key for key in keys if key not in self._programs and key not in self._failed]
        options = _COMMAND_BUFFERS if in_command_buffers else None
        compiling = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for key in new:
                try:
                    compiling[key] = pool.submit(self.lower(key[0]).compile, compiler_options=options)
                except Exception as error:  # of a value that a kernel cannot do; the others still count
                    self._leave_out(key, error)
        for key, program in compiling.items():
            try:
                self._programs[key] = self._checked(program.result())
            except Exception as error:
                self._leave_out(key, error)
        return {key[0]: self._programs[key] for key in keys if key in self._programs}

    def lower(self, choice: Choice) -> Any:
        """The program of a choice, to be compiled: takes the inputs of all products, gives the last results of each."""
        kernels = [self._kernel(*each) for each in zip(self._links, choice, strict=True)]

        def chain(inputs: Sequence[Any]) -> list[Any]:
            results: list[Any] = []
            for repeat in range(self._repeats):
                for kernel, operands in zip(kernels, inputs[repeat % len(inputs)], strict=True):
                    if results:  # keeps the order: these operands are there when the result before is
                        results[-1], operands = lax.optimization_barrier((results[-1], operands))
                    results.append(kernel(*operands))
            return results

        return jax.jit(chain).trace(self._inputs).lower(lowering_platforms=("cuda",))

    def _kernel(self, link: Link, prefetch: Prefetch) -> Callable[..., Any]:
        """A link's kernel, lowered once."""
        key = link, prefetch
        if key not in self._kernels:

            def run(*operands: Any) -> Any:
                with prefetching(prefetch):
                    return link.run(*operands)

            shapes = jax.eval_shape(lambda: _make_inputs(link))
            self._kernels[key] = export.export(jax.jit(run), platforms=("cuda",))(*shapes).call
        return self._kernels[key]

    def _checked(self, program: Callable[..., Any]) -> Callable[..., Any]:
        results = jax.block_until_ready(program(self._inputs))
        if self._expected is None:
            self._expected = results
        if not _are_equal(results, self._expected):
            raise ValueError("the results are not those of plain launches")
        return program

    def _leave_out(self, key: tuple[Choice, bool], error: Exception) -> None:
        self._failed.add(key)
        self._say(f"left out: {', '.join(map(str, key[0]))}: {describe(error)}")


def _make_inputs(link: Link) -> tuple[Any, ...]:
    return products.make_inputs(link) if isinstance(link, Product) else norms.make_inputs(link)


@jax.jit
def _hold(x: jax.Array) -> jax.Array:
    """Keeps the device busy."""
    return functools.reduce(jnp.matmul, [x] * _HOLD_PRODUCTS, x)


@jax.jit
def _are_equal(results: Any, expected: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    return jnp.array([jnp.array_equal(*pair) for pair in pairs]).all()
