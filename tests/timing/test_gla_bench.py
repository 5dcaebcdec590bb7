"""What the benchmark of gated linear attention compares, and the arithmetic of its floors on made-up measurements."""

from __future__ import annotations

import pytest
import torch

from headgate.methods.sequence.gla import bench
from headgate.timing import PeakMemory, Results, TaskResults, Times, relative_difference

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
STATE = 4 * 64 * 128


def results_at(bytes_ratio=2.0, growth=2.1, sgemm=100e9):
    """Ours takes 0.1 µs a token forward and 0.4 µs with backward; each rival is as many times slower as stands here."""
    rivals = {
        "forward": {"reference": {4096: 80.0}, "sdpa": {4096: 50.0, 16384: 200.0}, "sdpa_fused": {4096: 6.0, 16384: 24.0}},
        "training": {
            "autograd": {4096: 5.5},
            "sdpa": {4096: 30.0},
            "sdpa_fused": {4096: 4.5, 16384: 19.0},
        },
    }  # fmt: skip
    results = Results(sgemm=sgemm)
    plan = bench.plan(bench.Settings())
    for task in plan.tasks:
        found = TaskResults(
            name=task.name, label=task.label, size_label=task.size_label, sizes=task.sizes, ours=task.ours,
            contenders={contender.name: contender.label for contender in task.contenders},
            arithmetic={size: task.arithmetic(size) for size in task.sizes},
        )  # fmt: skip
        results.tasks[task.name] = found
        each = 1e-7 if task.name in ("forward", "growth") else 4e-7
        for size in task.sizes:
            # The machine is half as fast in the second round, for all.
            ours = (each * size, 2 * each * size, each * size)
            if task.name in rivals:
                for name, factors in rivals[task.name].items():
                    if size in factors:
                        found.times.append(Times(name, size, tuple(factors[size] * t for t in ours), 3))
            else:
                doublings = (size // 4096).bit_length() - 1
                ours = tuple(each * 4096 * growth**doublings for _ in range(3))
            found.times.append(Times("native", size, ours, 3))
        for size in task.memory_sizes:
            worst = bytes_ratio if size == 16384 else 1.5
            found.peaks.append(("native", size, PeakMemory(int(worst * 1000), 1000)))
    return results, {floor.name: floor for floor in plan.floors(results)}


def test_every_floor_against_a_rival_is_the_ratio_of_their_times():
    _, floors = results_at()
    values = {name: (floor.value, floor.limit, floor.met) for name, floor in floors.items() if floor.unit == "× faster"}
    close = pytest.approx
    assert values == {
        "forward-reference-4096": (close(80), 60, True),
        "forward-sdpa-4096": (close(50), 5, True),
        "forward-sdpa-16384": (close(200), 25, True),
        "forward-sdpa_fused-4096": (close(6), 5, True),
        "forward-sdpa_fused-16384": (close(24), 25, False),
        "training-autograd-4096": (close(5.5), 5, True),
        "training-sdpa-4096": (close(30), 4, True),
        "training-sdpa-16384": (None, 20, None),
        "training-sdpa_fused-4096": (close(4.5), 4, True),
        "training-sdpa_fused-16384": (close(19), 20, False),
    }


def test_the_arithmetic_rate_is_five_flop_for_each_entry_of_the_state_over_sgemm():
    # 5 · 4 · 64 · 128 FLOP in 0.1 µs are 1638.4 GFLOP/s.
    _, floors = results_at(sgemm=3276.8e9)
    assert floors["arithmetic-rate"].value == pytest.approx(0.5)
    assert floors["arithmetic-rate"].relation == "at least"
    _, floors = results_at(sgemm=3300e9)
    assert floors["arithmetic-rate"].met is False


def test_the_arithmetic_rate_is_that_of_the_worst_long_length():
    results, _ = results_at(sgemm=3276.8e9)
    task = results.tasks["forward"]
    slow = {1024: 9.0, 32768: 2.0}  # short lengths do not count
    task.times = [Times(t.contender, t.size, tuple(slow.get(t.size, 1) * s for s in t.samples), 3) for t in task.times]
    floor = next(f for f in bench.plan(bench.Settings()).floors(results) if f.name == "arithmetic-rate")
    assert floor.value == pytest.approx(0.25)
    assert floor.reason == "at L=32768"


@pytest.mark.parametrize(("ratio", "met"), [(2.5, True), (2.6, False)])
def test_the_memory_floor_takes_the_worst_length(ratio, met):
    _, floors = results_at(bytes_ratio=ratio)
    assert floors["memory"].value == pytest.approx(ratio)
    assert (floors["memory"].limit, floors["memory"].met) == (2.5, met)
    assert floors["memory"].reason == "worst at L=16384"


@pytest.mark.parametrize(("growth", "met"), [(2.1, True), (2.2, False)])
def test_the_growth_floors_take_the_worst_doubling(growth, met):
    _, floors = results_at(growth=growth)
    for name in ("growth", "growth-training"):
        assert floors[name].value == pytest.approx(growth)
        assert (floors[name].limit, floors[name].relation, floors[name].met) == (2.15, "at most", met)


def test_a_run_without_the_lengths_of_the_floors_says_so():
    plan = bench.plan(bench.QUICK)
    results = Results(sgemm=1.0)
    for task in plan.tasks:
        results.tasks[task.name] = TaskResults(
            task.name, task.label, task.size_label, task.sizes, {c.name: c.label for c in task.contenders}, task.ours
        )
    floors = plan.floors(results)
    assert all(floor.met is None and floor.reason for floor in floors)
    assert floors[0].reason == "length 4096 is not in this run"


def test_floors_are_judged_at_the_sizes_alone_for_which_they_are_stated():
    plan = bench.plan(bench.Settings(heads=8))
    assert plan.floors(Results()) == []
    assert any("not judged here" in note for note in plan.notes)


def contender_names(**changes):
    return {task.name: [c.name for c in task.contenders] for task in bench.plan(bench.Settings(**changes)).tasks}


def test_all_rivals_take_part():
    names = contender_names()
    assert names["forward"] == ["native", "chunk", "reference", "sdpa", "sdpa_fused", "fla"]
    assert names["training"] == ["native", "chunk", "reference", "autograd", "sdpa", "sdpa_fused", "fla"]
    assert names["growth"] == names["growth-training"] == ["native"]


def test_equal_widths_need_no_second_form_of_attention():
    assert "sdpa_fused" not in contender_names(key_dim=64, value_dim=64)["forward"]


def test_fla_is_left_out_on_a_cpu_with_the_reason():
    task = bench.plan(bench.Settings()).tasks[0]
    assert "for GPUs" in next(c for c in task.contenders if c.name == "fla").unavailable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backends": ("native", "fast")}, "backends must be among .*native.* got 'fast'"),
        ({"backends": ("reference",)}, "backends must be among"),
        ({"lengths": (0, 64)}, "lengths must be positive"),
        ({"heads": 0}, "heads must be positive, got heads=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bench.Settings(**changes)


def outcome(contender, backward=False, **sizes):
    return bench.build(
        contender, 40, backward=backward, **{"heads": 2, "key_dim": 8, "value_dim": 12, **sizes}
    ).prepare()()


@pytest.mark.parametrize("contender", ["native", "chunk", "parallel", "autograd"])
@pytest.mark.parametrize("backward", [False, True])
def test_contenders_of_gated_linear_attention_do_the_same_work(contender, backward):
    expected = outcome("reference", backward)
    assert relative_difference(outcome(contender, backward), expected) < 1e-5
    shapes = [tuple(x.shape) for x in expected] if backward else [tuple(expected.shape)]
    assert shapes == [(1, 40, 2, width) for width in ((12, 8, 8, 12, 8) if backward else (12,))]


@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 12), (12, 8)])
@pytest.mark.parametrize("backward", [False, True])
def test_padding_attention_for_the_fused_kernel_changes_no_result(backward, key_dim, value_dim):
    sizes = {"key_dim": key_dim, "value_dim": value_dim}
    assert relative_difference(outcome("sdpa_fused", backward, **sizes), outcome("sdpa", backward, **sizes)) < 1e-5


def test_attention_gets_its_heads_first_in_contiguous_inputs():
    tensors = bench.build("sdpa", 40, backward=False, heads=2).inputs()
    assert [tuple(x.shape) for x in tensors] == [(1, 2, 40, 64), (1, 2, 40, 64), (1, 2, 40, 128)]
    assert all(x.is_contiguous() for x in tensors)


def test_the_same_contender_gets_the_same_inputs_every_time():
    first, second = (bench.build("native", 16, backward=True).inputs() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert float(first[3].detach().max()) < 0


def test_memory_that_only_some_contenders_need_is_foreseen():
    tasks = {task.name: {c.name: c for c in task.contenders} for task in bench.plan(bench.Settings()).tasks}
    # 4 heads, 16384² scores of 4 bytes are 4 GiB; the loop keeps 65536 states of 32768 floats, 8 GiB.
    assert tasks["forward"]["sdpa"].needs(16384) == pytest.approx(2.5 * 4 * 2**30)
    assert tasks["training"]["sdpa"].needs(16384) == pytest.approx(3.1 * 4 * 2**30)
    assert tasks["training"]["reference"].needs(65536) == pytest.approx(1.25 * 8 * 2**30)
    assert tasks["forward"]["native"].needs is None
