"""What the benchmark of ViG compares, and the arithmetic of its floors on made-up measurements."""

from __future__ import annotations

import pytest
import torch

from headgate.methods.vision.vig import bench
from headgate.timing import PeakMemory, Results, TaskResults, Times, relative_difference

MIB = 2**20


@pytest.fixture
def results():
    found = Results()
    for task in bench.plan(bench.Settings()).tasks:
        found.tasks[task.name] = TaskResults(
            task.name, task.label, task.size_label, task.sizes, {c.name: c.label for c in task.contenders}, task.ours
        )
    return found


def floors(results):
    return {floor.name: floor for floor in bench.plan(bench.Settings()).floors(results)}


def test_models_are_held_against_each_other_by_time_and_memory(results):
    task = results.tasks["inference"]
    task.times = [
        Times("vig", 224, (0.020, 0.030, 0.021), 3), Times("deit", 224, (0.019, 0.033, 0.021), 3),
        Times("vig", 1024, (0.5, 0.6, 0.5), 3), Times("deit", 1024, (2.5, 2.4, 2.0), 3),
    ]  # fmt: skip
    task.peaks = [("vig", 1024, PeakMemory(30 * MIB, 12 * MIB)), ("deit", 1024, PeakMemory(50 * MIB, 12 * MIB))]
    found = floors(results)
    assert (found["time-224"].value, found["time-224"].met) == (pytest.approx(1.0), True)
    assert (found["time-1024"].value, found["time-1024"].met) == (pytest.approx(4.0), True)
    memory = found["memory-inference-1024"]
    assert (memory.value, memory.limit, memory.relation, memory.met) == (pytest.approx(0.6), 0.5, "at most", False)


def test_the_cost_of_blocks_grows_with_the_exponents_of_the_card(results):
    task = results.tasks["block"]
    for size in task.sizes:
        task.times.append(Times("vig", size, (1e-5 * size**1.1,), 1))
        # Quadratic only at the end.
        task.times.append(Times("explicit", size, (1e-9 * size**2 if size > 1000 else 1e-4 * size,), 1))
    task.peaks = [("vig", 4096, PeakMemory(20 * MIB, 6 * MIB)), ("explicit", 4096, PeakMemory(120 * MIB, 6 * MIB))]
    found = floors(results)
    assert (found["exponent-vig"].value, found["exponent-vig"].met) == (pytest.approx(1.1), True)
    assert (found["exponent-explicit"].value, found["exponent-explicit"].met) == (pytest.approx(2.0), True)
    assert (found["memory-block-4096"].value, found["memory-block-4096"].met) == (pytest.approx(6.0), True)


def test_what_was_not_measured_is_no_floor_met_and_says_why(results):
    results.tasks["block"].sizes = (16, 64)
    found = floors(results)
    assert found["exponent-vig"].met is None
    assert found["exponent-vig"].reason == "tokens 196 is not in this run"
    assert found["memory-block-4096"].reason == "tokens 4096 is not in this run"


def test_both_counts_of_the_card_are_met(results):
    found = floors(results)
    assert [found[name].limit for name in ("flops-full", "flops-paper", "flops-deit")] == [25.0, 20.2, 99.1]
    assert all(found[name].met for name in ("flops-full", "flops-paper", "flops-deit"))


@pytest.mark.parametrize(("size", "full", "paper"), [(224, 1.20, 0.97), (1024, 25.0, 20.2)])
def test_multiply_adds_are_those_of_the_card(size, full, paper):
    assert bench.multiply_adds("vig", size) / 1e9 == pytest.approx(full, rel=0.005)
    assert bench.multiply_adds("vig", size, as_paper=True) / 1e9 == pytest.approx(paper, rel=0.005)


def test_multiply_adds_of_deit_follow_from_its_sizes():
    tokens, dim = 14 * 14 + 1, 192
    block = 12 * dim**2 * tokens + 2 * tokens**2 * dim
    assert bench.multiply_adds("deit", 224) == 12 * block + 196 * 3 * 16**2 * dim + 1000 * dim


def test_deit_tiny_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = bench.deit_tiny(img_size=224)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_717_416


@pytest.mark.parametrize("contender", ["vig", "deit"])
def test_models_classify_images_without_gradients(contender):
    logits = bench.build_model(contender, 32, batch=2).prepare()()
    assert tuple(logits.shape) == (2, 1000)
    assert not logits.requires_grad


def test_building_leaves_the_global_random_state_as_it_was():
    before = torch.get_rng_state()
    first, second = (bench.build_model("vig", 32).prepare()() for _ in range(2))
    bench.build_block("deit", 16)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_explicit_attention_gives_the_results_of_the_fused_one():
    blocks = [bench.build_block(name, 64).prepare()() for name in ("deit", "explicit")]
    assert tuple(blocks[0].shape) == (1, 64, 192)
    assert relative_difference(*blocks) < 1e-5


def test_a_vig_block_gets_as_many_tokens_as_a_deit_block():
    (features,) = bench.build_block("vig", 64).inputs()
    (tokens,) = bench.build_block("deit", 64).inputs()
    assert tuple(features.shape) == (1, 192, 8, 8)
    assert torch.equal(features.permute(0, 2, 3, 1).flatten(1, 2), tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": (224, 230)}, "image_sizes must be multiples of 16 pixels, got 230"),
        ({"image_sizes": (0,)}, "image_sizes must be multiples of 16"),
        ({"block_tokens": (200,)}, "block_tokens must be square numbers, got 200"),
        ({"batch": 0}, "batch must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bench.Settings(**changes)


def test_floors_are_judged_for_one_image_on_a_cpu_alone(results):
    plan = bench.plan(bench.Settings(batch=4))
    assert plan.floors(results) == []
    assert any("not judged here" in note for note in plan.notes)
