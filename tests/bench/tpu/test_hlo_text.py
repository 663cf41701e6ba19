"""Reading compiled programs: on a text of the compiler's, cut down, whose numbers were added up by hand."""

import pytest

from bench.tpu.hlo_text import Operation, parse_program
from tests.helpers import raises_saying

TEXT = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(f)/while/body/mul"}, backend_config={"window_config":{"estimated_cycles":"100"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %all_to_all.3 = u8[32,24,128]{2,1,0} all-to-all(%fusion.1), channel_id=1, dimensions={0}, backend_config={"window_config":{"estimated_cycles":"77"}}
  ROOT %t = (s32[], bf16[8,128]) tuple(%p, %fusion.1)
}

%once (q: f32[4]) -> f32[4] {
  ROOT %cheap = f32[4]{0} add(%q, %q), backend_config={"window_config":{"estimated_cycles":"5"}}
}

%twice (r: f32[4]) -> f32[4] {
  ROOT %dear = f32[4]{0} add(%r, %r), backend_config={"window_config":{"estimated_cycles":"50"}}
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %while.1 = (s32[], bf16[8,128]) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[4]{0} conditional(%x, %x, %x), branch_computations={%once, %twice}
  %grouped_matmul.2 = f32[16,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"99999"}],"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"8192"}]}
  %start = (f32[4]{0}, f32[4]{0}) all-reduce-start(%c), to_apply=%add
  %huge = f32[4]{0} fusion(%c), kind=kCustom, calls=%f, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %y = bf16[8,128]{1,0} copy(%x), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def test_what_runs_and_how_often():
    program = parse_program(TEXT)
    cycles = {operation.name: times * operation.cycles for operation, times in program.executed() if operation.cycles}
    assert cycles == {"fusion.1": 300, "all_to_all.3": 231, "dear": 50, "y": 7}
    assert not program.has_dynamic_loops
    assert parse_program(TEXT.replace("known_trip_count", "other")).has_dynamic_loops


def test_collectives_count_the_bytes_of_their_results():
    assert parse_program(TEXT).collectives() == [
        {"kind": "all-reduce", "count": 1, "bytes": 16},
        {"kind": "all-to-all", "count": 3, "bytes": 3 * 32 * 24 * 128},
    ]


@pytest.mark.parametrize(
    ("type_", "size"),
    [("pred[3]", 3), ("f8e4m3fn[7]{0}", 7), ("s4[5]", 5), ("bf16[2,2]{1,0}", 8), ("c64[]", 8), ("(s32[2], u8[9])", 9)],
)
def test_bytes_of_a_result(type_, size):
    assert Operation("x", "copy", type_, "").result_bytes == size


def test_kernels_memory_and_where_an_operation_came_from():
    operations = {operation.name: operation for operation, _ in parse_program(TEXT).executed()}
    assert [name for name, operation in operations.items() if operation.is_kernel] == ["grouped_matmul.2"]
    assert operations["grouped_matmul.2"].vmem_bytes == 8192
    assert operations["fusion.1"].vmem_bytes == 4096
    assert operations["fusion.1"].source == "body/mul"


def test_a_text_without_a_program():
    with raises_saying(ValueError, "no ENTRY"):
        parse_program("HloModule empty")
