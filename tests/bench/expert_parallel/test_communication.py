"""What is told of an exchange where kernels are timed (made up here), and where they are not."""

import jax
import jax.numpy as jnp
import pytest

from bench.expert_parallel import decode_step
from bench.expert_parallel.communication import Communication, link_us
from bench.expert_parallel.layer_stages import StageTimes
from bench.inputs.weights import make_params
from bench.measure.clock import CallTime
from moejax import MoEConfig
from sharding.mesh import make_mesh

KERNELS = {
    "mosaic_gpu_all_to_all": 30.0,
    "make_routes": 10.0,
    "ncclDevKernel_SendRecv": 5.0,
    "xla::gpu::MultiGpuBarrierKernel": 4.0,
    "RaggedAllToAllDeviceKernelImpl": 0.5,
    "AllReduceKernelImpl": 0.25,
    "mosaic_gpu_grouped_matmul": 300.0,
    "loop_reduce_fusion": 2.0,
}


def test_kernels_between_chips_are_told_by_their_names():
    assert link_us(KERNELS) == 49.75


def test_what_is_exposed_is_what_the_other_kernels_do_not_fill():
    found = Communication.of(360.0, KERNELS)
    assert (found.link_us, found.others_us, found.exposed_us) == (49.75, 302.0, 58.0)
    assert found.record() == {"layer_us": 360.0, "link_us": 49.75, "others_us": 302.0, "exposed_us": 58.0}


@pytest.mark.parametrize(("ep", "has_kernel_times"), [(2, True), (2, False), (1, True)])
def test_a_decode_step_tells_it_of_several_gpus(ep, has_kernel_times, monkeypatch):
    def kernel_times(chain, x, params, *, repeats, calls):
        assert chain(x, params).shape == x.shape
        assert calls == 16 * ep
        return CallTime.of([351.0], KERNELS)

    def wall_times(chain, x, params, *, repeats, calls):
        assert chain(x, params).shape == x.shape
        assert calls == 16
        return CallTime.of([360.0])

    stages = StageTimes(by_kernels={"dispatch"} if has_kernel_times else set())
    monkeypatch.setattr(decode_step, "time_stages", lambda *_: stages)
    monkeypatch.setattr(decode_step, "kernel_times", kernel_times)
    monkeypatch.setattr(decode_step, "wall_times", wall_times)
    config = MoEConfig(hidden_size=128, intermediate_size=64, num_experts=4, top_k=2)
    mesh = make_mesh(ep, devices=jax.devices("cpu")[:ep])
    x = jax.random.normal(jax.random.key(0), (16, 128), jnp.bfloat16)
    run = decode_step.run_decode(x, make_params(config, mesh, 0), config, mesh, lambda line: None)
    assert run.communication == (Communication(360.0, 49.75, 302.0) if has_kernel_times and ep > 1 else None)
