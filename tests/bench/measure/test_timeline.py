"""Time lines of GPUs, written by hand."""

import jax
import pytest
from jax.profiler import ProfileData

from bench.measure.timeline import Launch, last_call, launches_in, recorded, spans

RECORDING = """
planes { name: "/host:CPU" lines { name: "Stream #1" events { metadata_id: 1 duration_ps: 1 } } }
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #7(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 2500000 }
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
  }
  lines { name: "XLA Modules" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  lines { name: "Stream #8(Compute)" events { metadata_id: 1 offset_ps: 2000000 duration_ps: 1000000 } }
  event_metadata { key: 1 value { id: 1 name: "first" } }
  event_metadata { key: 2 value { id: 2 name: "second" } }
}
"""


def read(text):
    return launches_in(ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text)))


def test_launches_of_the_first_gpu_in_the_order_of_their_begin():
    assert read(RECORDING) == [Launch("first", 1, 5), Launch("first", 2, 3), Launch("second", 6, 8.5)]


def test_a_recording_without_a_gpu_has_none():
    assert read('planes { name: "/host:CPU" }') == []


def test_a_span_counts_gaps_and_counts_overlaps_once():
    gap = [Launch("a", 10, 12), Launch("b", 15, 20)]
    overlap = [Launch("a", 30, 36), Launch("b", 33, 35)]
    assert spans([*gap, *overlap], 2) == [10, 6]


def test_the_last_of_several_calls_begins_at_0():
    launches = [
        Launch("before", 1, 2),
        *(Launch(name, t, t + 2) for t in (5, 15) for name, t in (("a", t), ("b", t + 3))),
    ]
    assert last_call(launches, 2) == [Launch("a", 0, 2), Launch("b", 3, 5)]
    assert last_call([], 2) == []


@pytest.mark.parametrize("count", [0, 3])
def test_runs_that_are_not_whole_are_an_error(count):
    with pytest.raises(ValueError, match=f"whole runs of 2 kernels, got {count} kernels"):
        spans([Launch("a", 0, 1)] * count, 2)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_is_an_error():
    with pytest.raises(ValueError, match="need an NVIDIA GPU, and jax runs on cpu here"):
        recorded(lambda: None)
