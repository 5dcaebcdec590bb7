"""Several objects per picture: layouts, masks, boxes and streams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from headgate.data.scenes import MultiObject, World
from headgate.data.scenes.drawing import disc_overlap
from headgate.data.scenes.palette import object_rgb
from headgate.data.scenes.tables import FactorTable
from headgate.data.seeding import stream_generator


def test_batch_has_the_documented_shapes() -> None:
    batch = MultiObject(World(), (2, 4), slots=5).batch(6, stream_generator(0))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {
        "image": (6, 3, 32, 32),
        "masks": (6, 6, 32, 32),
        "labels": (6, 32, 32),
        "factors": (6, 5, 7),
        "present": (6, 5),
        "boxes": (6, 5, 4),
        "crowded": (6,),
        "background": (6,),
    }


def test_number_of_objects_is_uniform_in_its_range_and_padding_is_empty() -> None:
    batch = MultiObject(World(16), (2, 4), slots=6).batch(3000, stream_generator(1))
    number = batch["present"].sum(dim=1)
    counts = torch.bincount(number, minlength=7) / 3000
    assert counts[[0, 1, 5, 6]].tolist() == [0, 0, 0, 0]
    assert float((counts[2:5] - 1 / 3).abs().max()) < 0.04
    absent = ~batch["present"]
    assert float(batch["masks"][:, 1:][absent].abs().sum()) == 0
    assert float(batch["boxes"][absent].abs().sum()) == 0
    assert int(batch["factors"][absent].abs().sum()) == 0


def test_masks_sum_to_one_and_labels_are_their_largest() -> None:
    batch = MultiObject(World(), (1, 5), max_overlap=1.0).batch(64, stream_generator(2))
    torch.testing.assert_close(batch["masks"].sum(dim=1), torch.ones(64, 32, 32), rtol=0, atol=1e-6)
    assert torch.equal(batch["labels"], batch["masks"].argmax(dim=1))


def test_every_object_shows_in_its_own_colour() -> None:
    world = World()
    batch = MultiObject(world, (1, 4)).batch(100, stream_generator(3))
    palette = torch.tensor([object_rgb(name) for name in world.names("hue")])
    hue = world.object_factors.index("hue")
    pixels = (batch["image"] * 255).round().long().permute(0, 2, 3, 1)
    for slot in range(4):
        whole = batch["masks"][:, slot + 1] == 1
        expected = palette[batch["factors"][:, slot, hue]][:, None, None].expand(-1, 32, 32, -1)
        assert whole.any()
        assert torch.equal(pixels[whole], expected[whole])


def test_boxes_frame_what_objects_cover() -> None:
    world = World()
    dataset = MultiObject(world, (1, 3), max_overlap=0.0)
    scenes = dataset.draw(50, stream_generator(4))
    drawn = world.render({name: scenes[name] for name in (*world.factors, "present")}, True)
    boxes = dataset.paint(scenes)["boxes"]
    for row in range(50):
        for slot in range(3):
            rows, columns = (drawn.amodal[row, slot] > 0).nonzero(as_tuple=True)
            expected = [0.0] * 4
            if len(rows):
                expected = [int(v) / 32 for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
            assert boxes[row, slot].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("distance", "first", "second", "expected"),
    [
        (5.0, 2.0, 3.0, 0.0),
        (9.0, 2.0, 3.0, 0.0),
        (1.0, 2.0, 3.0, 1.0),
        (0.0, 2.0, 3.0, 1.0),
        (3.0, 2.0, 3.0, 0.5),
        (2.0, 2.0, 2.0, 0.5),
    ],
)
def test_disc_overlap_by_hand(distance: float, first: float, second: float, expected: float) -> None:
    overlap = disc_overlap(
        torch.tensor([0.0, 0.6 * distance]), torch.tensor([0.0, 0.8 * distance]), torch.tensor([first, second])
    )
    assert overlap.tolist() == [[0.0, pytest.approx(expected)], [pytest.approx(expected), 0.0]]


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_overlap_stays_below_its_limit_unless_flagged(limit: float) -> None:
    world = World()
    batch = MultiObject(world, (3, 5), max_overlap=limit).batch(400, stream_generator(5))
    names = world.object_factors
    value = {name: batch["factors"][..., names.index(name)] for name in ("size", "x", "y")}
    place = world.values("x")
    overlap = disc_overlap(place[value["x"]], place[value["y"]], world.values("size")[value["size"]])
    both = batch["present"][:, :, None] & batch["present"][:, None]
    worst = (overlap * both).flatten(1).amax(dim=1)
    assert torch.equal(worst > limit, batch["crowded"])
    assert 0 < float(batch["crowded"].float().mean()) < 0.9


def test_few_usual_scenes_are_crowded() -> None:
    batch = MultiObject(World(16), (2, 4)).batch(2000, stream_generator(6))
    assert float(batch["crowded"].float().mean()) < 0.05


def test_rejecting_layouts_leaves_looks_uniform() -> None:
    world = World(16)
    batch = MultiObject(world, 3, max_overlap=0.0).batch(4000, stream_generator(7))
    for name in ("shape", "size", "hue"):
        counts = torch.bincount(batch["factors"][..., world.object_factors.index(name)].flatten()) / 12_000
        assert float((counts - 1 / len(counts)).abs().max()) < 0.015


def test_same_seed_stream_and_step_are_the_same_batch() -> None:
    dataset = MultiObject(World(16), (2, 4))
    first = dataset.loader(batch_size=8, steps=4, seed=0)
    again = MultiObject(World(16), (2, 4)).loader(batch_size=8, steps=2, seed=0)
    for name, value in first[1].items():
        assert torch.equal(value, again[1][name])
    images = [first[0], first[1], dataset.loader(8, 4, seed=1)[0], dataset.loader(8, 4, seed=0, stream=1)[0]]
    assert len({batch["image"].numpy().tobytes() for batch in images}) == 4
    with pytest.raises(IndexError, match="step must lie"):
        first[4]


def test_drawing_touches_no_global_state() -> None:
    before = torch.random.get_rng_state()
    MultiObject(World(16)).batch(4, stream_generator(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_examples_are_named_by_their_number_and_the_seed() -> None:
    dataset = MultiObject(World(16), seed=1)
    assert torch.equal(dataset.example(3)["image"], MultiObject(World(16), seed=1).example(3)["image"])
    assert not torch.equal(dataset.example(3)["image"], dataset.example(4)["image"])
    assert not torch.equal(dataset.example(3)["image"], MultiObject(World(16), seed=2).example(3)["image"])


def test_dtypes_and_ranges() -> None:
    base = MultiObject(World(16)).batch(4, stream_generator(0))["image"]
    whole = MultiObject(World(16), out="uint8").batch(4, stream_generator(0))["image"]
    assert whole.dtype == torch.uint8
    assert float((whole / 255 - base).abs().max()) < 0.002
    stretched = MultiObject(World(16), range="-11").batch(4, stream_generator(0))["image"]
    torch.testing.assert_close(stretched, base * 2 - 1)


def test_tables_shape_the_joint_distribution_of_factors() -> None:
    world = World(16, positions=4)
    weights = torch.rand(4, 8, generator=stream_generator(8), dtype=torch.float64)
    weights[0, 0] = weights[3, 7] = 0
    by_place = torch.eye(4, dtype=torch.float64)[:, torch.arange(8) % 4]
    tables = [FactorTable(("shape", "hue"), weights), FactorTable(("x", "background"), by_place)]
    dataset = MultiObject(world, 2, max_overlap=1.0, tables=tables)
    batch = dataset.batch(6000, stream_generator(9))
    column = {name: batch["factors"][..., world.object_factors.index(name)] for name in world.object_factors}
    joint = torch.bincount((column["shape"] * 8 + column["hue"]).flatten(), minlength=32).view(4, 8) / 12_000
    assert float((joint - weights / weights.sum()).abs().max()) < 0.01
    assert joint[0, 0] == joint[3, 7] == 0
    assert torch.equal(column["x"], (batch["background"] % 4)[:, None].expand(-1, 2))
    assert float((torch.bincount(batch["background"]) / 6000 - 1 / 8).abs().max()) < 0.02
    marginal = dataset.sampler.marginal(("hue",))
    torch.testing.assert_close(marginal, weights.sum(dim=0) / weights.sum())


def test_tables_that_share_a_factor_are_multiplied() -> None:
    world = World(16)
    first = FactorTable(("shape", "hue"), torch.ones(4, 8).triu().double())
    second = FactorTable(("hue",), torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]))
    batch = MultiObject(world, 2, tables=[first, second]).batch(500, stream_generator(0))
    shape, hue = batch["factors"][..., 0], batch["factors"][..., 5]
    assert bool((hue >= shape).all())
    assert int(hue.max()) == 2
    assert int(shape.max()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_objects": 5, "slots": 4}, "at most slots=4"),
        ({"n_objects": (3, 2)}, "ascending"),
        ({"n_objects": 0}, "1 or more"),
        ({"max_overlap": 1.5}, "max_overlap must lie"),
        ({"split": "random"}, "kind must be one of"),
        ({"split": "iid", "part": "dev"}, "part must be one of"),
        ({"out": "float64"}, "out must be"),
        ({"tables": [FactorTable(("shape", "hue"), torch.ones(3, 8))]}, "must have shape"),
        ({"tables": [FactorTable(("form",), torch.ones(3))]}, "factors must be out of"),
        (
            {"tables": [FactorTable(("hue",), torch.eye(8)[0]), FactorTable(("hue",), torch.eye(8)[1])]},
            "together allow nothing",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiObject(World(16), **arguments)


@pytest.mark.parametrize(
    "weights", [torch.tensor([1.0, -1.0]), torch.zeros(2), torch.tensor([1.0, math.nan]), torch.ones(2, 2)]
)
def test_bad_weights_are_refused(weights: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="weights"):
        FactorTable(("hue",), weights)
