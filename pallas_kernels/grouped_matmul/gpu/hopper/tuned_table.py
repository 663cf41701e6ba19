"""Configurations that were measured to beat the model's choice: a JSON file per chip under `tuned/`.

`python -m bench.tune` writes it. An entry holds the fields of `Key`, the configuration, and two times in µs: its own,
and that of the model's choice in the same run.

    {"chip": "NVIDIA H200", ..., "entries": [
      {"operand": "bfloat16", "block_scales": false, "fused": false, "result_in_8_bits": false, "num_groups": 8,
       "rows": 64, "depth": 7168, "columns": 2048, "config": {"block_m": 64, ...}, "us": ..., "model_us": ...}, ...]}

A chip without a file has no entries. Of a configuration a table holds what cuts the work, the fields of `TILES`.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pallas_kernels.grouped_matmul.gpu.hopper.problem import Config, Problem

TILES = tuple(field.name for field in dataclasses.fields(Config) if field.name != "prefetch")
"""Fields of a configuration."""


@dataclasses.dataclass(frozen=True)
class Key:
    """The products that share an entry.

    Attributes:
      operand: dtype of the operands.
      block_scales: whether scales come every 128 of K.
      fused: whether gate and up are multiplied together.
      result_in_8_bits: whether the result is rounded to FP8.
      num_groups: G.
      rows: rows of a group, rounded up to a power of two.
      depth: K.
      columns: columns of rhs.
    """

    operand: str
    block_scales: bool
    fused: bool
    result_in_8_bits: bool
    num_groups: int
    rows: int
    depth: int
    columns: int

    @classmethod
    def of(cls, problem: Problem) -> "Key":
        """The key of a product."""
        fields = dataclasses.asdict(problem) | {"rows": 1 << (problem.rows - 1).bit_length()}
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


@functools.cache
def tuned_configs(chip: str) -> Mapping[Key, Config]:
    """The table of the chip called `chip`."""
    file = importlib.resources.files(__package__) / "tuned" / f"{chip}.json"
    return parse_table(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else MappingProxyType({})


def parse_table(table: Mapping[str, Any]) -> Mapping[Key, Config]:
    """The entries of a file."""
    names = [field.name for field in dataclasses.fields(Key)]
    return MappingProxyType(
        {Key(**{name: entry[name] for name in names}): Config(**entry["config"]) for entry in table["entries"]}
    )
