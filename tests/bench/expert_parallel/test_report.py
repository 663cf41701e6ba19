from bench.expert_parallel.modelled import operators_table
from bench.model.times import model_layer
from bench.model.workloads import Workload
from pallas_kernels.chips import get_chip


def test_layer_table_ends_with_the_sum():
    layer = model_layer(get_chip("v32-run"), Workload(7168, 2048, 2048, 256, 8, 1536, 1, 32, 32, 1))
    lines = operators_table(layer).splitlines()
    assert len(lines) == 2 + len(layer.operators) + 1
    assert "8,48,7168,2048" in lines[6]
    assert lines[6].split()[-3:] == ["17.961", "129.237", "81.734"]
    assert f"{layer.elapsed:,.3f}" in lines[-1]
