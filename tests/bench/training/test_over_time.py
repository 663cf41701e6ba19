"""Tables over time, of records made by hand."""

from bench.training.over_time import (
    balance_table,
    difference_table,
    loss_table,
    precision_differences,
    router_differences,
    steps_shown,
)
from bench.training.records import Run


def a_run(losses: dict[int, float | None], router="softmax", precision="w16a16", seed=0, causal=True) -> Run:
    head = {"router": router, "precision": precision, "seed": seed, "causal": causal}
    looks = [
        {"step": step, "loss": loss, "load": [[2, 2], [1 + step, 3]], "load_entropy": [1.0, 0.5 if step else None]}
        for step, loss in losses.items()
    ]
    return Run(head, [], looks)


RUNS = [
    a_run({0: 5.5, 10: 3.0, 20: 2.0}, seed=0),
    a_run({0: 5.5, 10: 3.2, 20: 2.2}, seed=1),
    a_run({0: 5.5, 10: 2.9, 20: 2.3}, "hash"),
    a_run({0: 5.5, 10: 1.0, 20: 1.0}, "soft_moe", causal=False),
    a_run({0: 5.5, 10: 3.1, 20: 2.5}, precision="w8a8", seed=0),
    a_run({0: 5.5, 10: 3.2, 20: 2.3}, precision="w8a8", seed=1),
    a_run({0: 5.5, 10: 3.2, 20: None}, precision="w8a8", seed=2),
]


def test_steps_are_halved_from_the_last():
    looks = dict.fromkeys([0, 67, 200, 250, 400, 500, 600, 800, 1000, 1800, 2000], 1.0)
    assert steps_shown([a_run(looks)]) == [67, 250, 500, 1000, 2000]
    assert steps_shown([a_run({0: 1.0})]) == []


def test_losses_have_intervals_and_causal_routers_a_rank():
    headers, rows = loss_table(RUNS)
    assert headers == ["router", "10", "rank at 10", "20", "rank at 20"]
    assert rows == [
        ["softmax", "3.1000 ± 1.2706", 2, "2.1000 ± 1.2706", 1],
        ["hash", "2.9000", 1, "2.3000", 2],
        ["soft_moe", "1.0000", None, "1.0000", None],
        ["softmax-w8a8", "3.1667 ± 0.1434", 1, "2.4000 ± 1.2706", 1],
    ]


def test_precisions_are_compared_seed_by_seed():
    headers, rows = difference_table(RUNS, precision_differences(RUNS))
    assert headers == ["router", "10", "seeds at 10", "20", "seeds at 20"]
    assert rows == [["softmax-w8a8", "0.0500 ± 0.6353", 2, "0.3000 ± 2.5412", 2]]
    assert precision_differences(RUNS[:4]) == {}


def test_routers_are_compared_with_softmax_in_the_same_precision_seed_by_seed():
    other = a_run({0: 5.5, 10: 3.0, 20: 2.0}, "hash", precision="w8a8", seed=1)
    runs = [*RUNS, other]
    _, rows = difference_table(runs, router_differences(runs))
    assert rows == [
        ["hash", "-0.1000", 1, "0.3000", 1],
        ["soft_moe", "-2.0000", 1, "-1.0000", 1],
        ["hash-w8a8", "-0.2000", 1, "-0.3000", 1],
    ]
    assert router_differences(RUNS[2:4]) == {}


def test_balance_is_that_of_the_worst_layer():
    _, rows = balance_table(RUNS[:1])
    assert rows == [["softmax", f"0.50 / {22 / 14:.1f}", f"0.50 / {42 / 24:.1f}"]]
