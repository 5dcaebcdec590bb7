"""Splits: disjoint, complete, and what they hold out."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.data.scenes import MultiObject, SingleObject, World, split
from headgate.data.scenes.splits import in_bucket
from headgate.data.seeding import splitmix64, stream_generator


def pairs(dataset: SingleObject, index: Tensor, *names: str) -> set[tuple[int, ...]]:
    columns = [dataset.factor_names.index(name) for name in names]
    return {tuple(row) for row in dataset.factors(index)[:, columns].unique(dim=0).tolist()}


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "iid"},
        {"kind": "combination"},
        {"kind": "combination", "order": 3},
        {"kind": "range", "factors": "x", "side": "both"},
        {"kind": "correlated", "rho": 0.8},
    ],
)
def test_parts_share_no_picture(options: dict[str, Any]) -> None:
    dataset = SingleObject(World(16, positions=4), out="uint8")
    parts = dataset.split(**options, seed=3)
    assert all(len(part) for part in parts.values())
    seen = torch.cat(list(parts.values()))
    assert len(seen.unique()) == len(seen)
    canonical = {
        name: dataset.world.index(dataset.world.canonical(dataset.scene(part))) for name, part in parts.items()
    }
    for first, second in combinations(canonical.values(), 2):
        assert not bool(torch.isin(first, second).any())


@pytest.mark.parametrize("kind", ["iid", "combination", "range"])
def test_parts_cover_the_grid(kind: str) -> None:
    dataset = SingleObject(World(16, positions=4), "shapes3d-lite")
    parts = dataset.split(kind)
    assert sum(len(part) for part in parts.values()) == len(dataset)


def test_iid_parts_are_hashes_of_the_grid_index() -> None:
    dataset = SingleObject(World(16, shapes=("triangle",), positions=4))
    parts = dataset.split("iid", seed=7)
    for name, low, high in (("train", 0, 800), ("val", 800, 900), ("test", 900, 1000)):
        share = len(parts[name]) / len(dataset)
        assert share == pytest.approx((high - low) / 1000, abs=0.02)
        for index in parts[name][:40].tolist():
            assert low <= splitmix64(7, index) % 1000 < high
    assert not torch.equal(parts["test"], dataset.split("iid", seed=8)["test"])


def test_unique_leaves_out_pictures_that_look_alike() -> None:
    dataset = SingleObject(World(16, positions=2), out="uint8")
    parts = dataset.split("iid", unique=True)
    seen = torch.cat(list(parts.values()))
    assert len(seen) == int(dataset.is_canonical(torch.arange(len(dataset))).sum())
    plain = dataset.split("iid")
    assert set(parts["test"].tolist()) <= set(plain["test"].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_combination_holds_out_an_eighth_of_the_pairs_and_no_value(seed: int) -> None:
    dataset = SingleObject(World(16, positions=2), "shapes3d-lite")
    parts = dataset.split("combination", seed)
    train, test = pairs(dataset, parts["train"], "shape", "hue"), pairs(dataset, parts["test"], "shape", "hue")
    assert len(test) == 4
    assert len(train) == 28
    assert not train & test
    assert {shape for shape, _ in train} == set(range(4))
    assert {hue for _, hue in train} == set(range(8))
    assert pairs(dataset, parts["val"], "shape", "hue") == train
    others = set(dataset.factor_names) - {"shape", "hue"}
    for name in others:
        assert pairs(dataset, parts["train"], name) == pairs(dataset, parts["test"], name)


@pytest.mark.parametrize("seed", range(3))
def test_combination_of_three_holds_out_triples_whose_pairs_are_all_seen(seed: int) -> None:
    dataset = SingleObject(World(16, positions=2), "shapes3d-lite")
    names = ("shape", "hue", "size")
    parts = dataset.split("combination", seed, order=3)
    train, test = pairs(dataset, parts["train"], *names), pairs(dataset, parts["test"], *names)
    assert len(test) == 4 * 8 * 3 // 8
    assert not train & test
    assert len(train | test) == 96
    for two in combinations(names, 2):
        assert pairs(dataset, parts["train"], *two) == pairs(dataset, torch.arange(len(dataset)), *two)


def test_different_seeds_hold_out_different_pairs() -> None:
    dataset = SingleObject(World(16, positions=2), "shapes3d-lite")
    held = {frozenset(pairs(dataset, dataset.split("combination", seed)["test"], "shape", "hue")) for seed in range(6)}
    assert len(held) > 3


@pytest.mark.parametrize(
    ("side", "held", "expected"),
    [("high", 2, {6, 7}), ("low", 1, {0}), ("both", 2, {0, 1, 6, 7}), ("high", None, {6, 7})],
)
def test_range_holds_out_extreme_values(side: str, held: int | None, expected: set[int]) -> None:
    dataset = SingleObject(World(16), "shapes3d-lite")
    parts = dataset.split("range", factors="x", side=side, held=held)
    assert {value for (value,) in pairs(dataset, parts["test"], "x")} == expected
    assert {value for (value,) in pairs(dataset, parts["train"], "x")} == set(range(8)) - expected


@pytest.mark.parametrize("rho", [0.0, 0.7, 1.0])
def test_correlated_ties_two_factors_in_training_alone(rho: float) -> None:
    dataset = SingleObject(World(16, positions=4), "shapes3d-lite")
    parts = dataset.split("correlated", 1, factors=("hue", "background"), rho=rho)
    columns = [dataset.factor_names.index(name) for name in ("hue", "background")]

    def joint(part: str) -> Tensor:
        values = dataset.factors(parts[part])[:, columns]
        counts = torch.bincount(values[:, 0] * 8 + values[:, 1], minlength=64).view(8, 8).double()
        return counts / counts.sum()

    partner = joint("train").argmax(dim=1)
    agreement = {part: float(joint(part)[torch.arange(8), partner].sum()) for part in parts}
    expected = rho + (1 - rho) / 8
    assert agreement["train"] == pytest.approx(expected, abs=0.03)
    assert agreement["val"] == pytest.approx(expected, abs=0.05)
    assert agreement["test"] == pytest.approx(1 / 8, abs=0.04)
    assert rho == 0 or len(partner.unique()) == 8


def test_streams_keep_to_their_part() -> None:
    world = World(16)
    rule = split("combination", 2)
    parts = SingleObject(world, "shapes3d-lite").split(rule)
    grid = SingleObject(world, "shapes3d-lite")
    held = pairs(grid, parts["test"], "shape", "hue")
    for part in ("train", "val", "test"):
        dataset = MultiObject(world, (1, 3), split=rule, part=part)
        batch = dataset.batch(300, stream_generator(0))
        looks = batch["factors"][..., [0, 5]][batch["present"]]
        found = {tuple(row) for row in looks.unique(dim=0).tolist()}
        assert (found == held) if part == "test" else (len(found) == 28 and not found & held)


def test_streams_of_iid_parts_fall_into_their_buckets() -> None:
    world = World(16)
    for part, buckets in (("train", (0, 800)), ("test", (900, 1000))):
        dataset = MultiObject(world, (1, 3), split=split("iid", 4), part=part)
        assert dataset.part.buckets == buckets
        scenes = dataset.draw(200, stream_generator(0))
        assert bool(in_bucket(world, dataset.part, scenes).all())
        for row in range(20):
            grid = {name: scenes[name][row] for name in world.object_factors}
            grid |= {name: scenes[name][row].expand(3) for name in world.scene_factors}
            index = world.index(world.canonical(grid))[scenes["present"][row]]
            assert buckets[0] <= splitmix64(4, *index.tolist()) % 1000 < buckets[1]


def test_streams_of_one_object_and_grids_are_split_alike() -> None:
    world = World(16)
    grid = SingleObject(world)
    test = set(grid.split("iid", 5)["test"].tolist())
    dataset = MultiObject(world, 1, split=split("iid", 5), part="test")
    scenes = dataset.draw(100, stream_generator(0))
    rows = torch.stack([scenes[n] if n in world.scene_factors else scenes[n][:, 0] for n in grid.factor_names], dim=1)
    assert set(grid.index(rows).tolist()) <= test


def test_count_shows_more_objects_at_test() -> None:
    world = World(16)
    numbers = {}
    for part in ("train", "val", "test"):
        batch = MultiObject(world, (1, 4), split=split("count", boundary=2), part=part).batch(200, stream_generator(0))
        numbers[part] = set(batch["present"].sum(dim=1).tolist())
        assert batch["present"].shape == (200, 4)
    assert numbers == {"train": {1, 2}, "val": {1, 2}, "test": {3, 4}}


def test_a_part_is_a_predicate_on_factors() -> None:
    world = World(16)
    train = MultiObject(world, 2, split=split("combination", 2), part="train")
    test = MultiObject(world, 2, split=split("combination", 2), part="test")
    scenes = train.draw(50, stream_generator(0))
    assert bool(train.allows(scenes).all())
    assert not bool(test.allows(scenes).any())
    assert bool(test.allows({**scenes, "present": torch.zeros(50, 2, dtype=torch.bool)}).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fold"}, "kind must be one of"),
        ({"kind": "combination", "factors": ("shape",)}, "factors must be 2 or 3"),
        ({"kind": "combination", "order": 4}, "order=4"),
        ({"kind": "combination", "factors": ("shape", "shape")}, "different"),
        ({"kind": "range", "factors": ("x", "y")}, "factors must be 1"),
        ({"kind": "range", "side": "middle"}, "side must be"),
        ({"kind": "correlated", "rho": 1.5}, "rho must lie"),
        ({"kind": "iid", "factors": ("x",)}, "factors must be 0"),
    ],
)
def test_bad_splits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(**options)


def test_splits_that_do_not_fit_are_refused() -> None:
    dataset = SingleObject(World(16, backgrounds=1), "shapes3d-lite")
    with pytest.raises(ValueError, match="factors that vary in this grid, got background"):
        dataset.split("correlated", factors=("hue", "background"))
    with pytest.raises(ValueError, match="several objects"):
        dataset.split("count")
    with pytest.raises(ValueError, match="leave values"):
        dataset.split("range", factors="size", held=3)
    with pytest.raises(ValueError, match="boundary must lie"):
        MultiObject(World(16), (1, 3), split=split("count", boundary=3))
    with pytest.raises(ValueError, match="boundary must lie"):
        MultiObject(World(16), 3, split="count")
    with pytest.raises(ValueError, match="two values or more"):
        MultiObject(World(16, shapes=1), 2, split="combination")
    with pytest.raises(ValueError, match="too few pictures"):
        tiny = World(16, shapes=1, sizes=1, rotations=1, positions=1, hues=1, backgrounds=1)
        used = [part for part in ("train", "val", "test") if _draws(tiny, part)]
        assert len(used) == 1
        MultiObject(tiny, 1, split="iid", part=next(p for p in ("val", "test", "train") if p not in used)).batch(1)


def _draws(world: World, part: str) -> bool:
    try:
        MultiObject(world, 1, split="iid", part=part).batch(1, stream_generator(0))
    except ValueError:
        return False
    return True
