"""What the text of a compiled TPU program says: collectives, fast memory, and the cycles that the compiler expects.

The compiler notes its own estimate beside most operations. It knows neither a loop's trips that only the data tell
(such a loop counts once here) nor the network: no estimate of a collective is taken for one.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharding.exchange import LATER_ROUNDS

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NO_ESTIMATE = 1 << 62


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled programme: its result's type and, in `attributes`, the rest of its line as text."""

    name: str
    opcode: str
    type: str
    attributes: str

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none, or a huge number, as for what SparseCores do."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found and int(found[1]) < _NO_ESTIMATE else 0

    @property
    def source(self) -> str:
        """The end of the path of jax's operations that it came from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return "/".join(found[1].split("/")[-2:]) if found else ""

    @property
    def vmem_bytes(self) -> int:
        """Fast memory that it takes for itself while it runs."""
        used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', self.attributes)
        sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1]) if used else []
        return max(map(int, sizes), default=0)

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes

    @property
    def collective(self) -> str | None:
        """The kind of collective that it is or starts."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def trip_count(self) -> int | None:
        """The trips of a loop; None where only the data tell."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def called(self, *names: str) -> list[str]:
        """The computations that some of its attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name.strip().lstrip("%") for group in found for name in group.strip("{}").split(",")]

    @property
    def result_bytes(self) -> int:
        """Bytes of its result; of a tuple, of its largest element."""
        return max((_bytes(dtype, sizes) for dtype, sizes in _ARRAY.findall(self.type)), default=0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled programme: its computations by name, and the name of the first."""

    computations: Mapping[str, Sequence[Operation]]
    entry: str

    def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Operation, int]]:
        """Each operation that runs by itself, and how many times; of several branches, that with the most cycles.

        Later rounds of an exchange are left out, as one is usually enough: their loops, and, of branches on whether
        there are any, those with the most cycles.

        Args:
          name: the computation, the first if None.
          times: that it runs.
        """
        for operation in self.computations.get(name or self.entry, ()):
            is_later = LATER_ROUNDS in operation.attributes
            if operation.opcode == "while":
                for body in () if is_later else operation.called("body"):
                    yield from self.executed(body, times * (operation.trip_count or 1))
            elif operation.opcode == "conditional":
                names = operation.called("branch_computations", "true_computation", "false_computation")
                branches = [list(self.executed(branch, times)) for branch in names]
                choose = min if is_later else max
                yield from choose(branches, key=lambda ops: sum(op.cycles * n for op, n in ops), default=())
            elif operation.opcode in ("call", "async-start"):
                for called in operation.called("to_apply", "calls"):
                    yield from self.executed(called, times)
            else:
                yield operation, times

    @property
    def has_dynamic_loops(self) -> bool:
        """Whether some loop's trips are not known to the compiler."""
        operations = [op for operations in self.computations.values() for op in operations]
        return any(op.opcode == "while" and op.trip_count is None for op in operations)

    def collectives(self) -> list[dict[str, Any]]:
        """The collectives by kind: how many a device takes part in, and the bytes of their results there."""
        found: dict[str, list[int]] = {}
        for operation, times in self.executed():
            if kind := operation.collective:
                found.setdefault(kind, []).extend([operation.result_bytes] * times)
        return [{"kind": kind, "count": len(sizes), "bytes": sum(sizes)} for kind, sizes in sorted(found.items())]


def parse_program(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Operation]] = {}
    entry = ""
    current: list[Operation] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := _OPERATION.match(line):
            current.append(Operation(found[1], found[3], found[2], line[found.end() :]))
    if not entry:
        raise ValueError("the compiled programme's text has no ENTRY computation")
    return Program(computations, entry)


def _bytes(dtype: str, sizes: str) -> int:
    bits = int(re.search(r"\d+", f"{dtype} 8")[0])  # type: ignore[index]  # the first number, 8 for pred
    return math.prod(map(int, filter(None, sizes.split(",")))) * max(8, bits) // 8
