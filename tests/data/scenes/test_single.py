"""One object per picture: the grid, traversals, presets and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from headgate.data.factors import FactorDataset
from headgate.data.scenes import SingleObject, World
from headgate.data.scenes.palette import object_rgb
from headgate.data.seeding import stream_generator


def test_presets_have_the_documented_factors_and_sizes() -> None:
    world = World()
    full = SingleObject(world)
    assert len(full) == 4 * 3 * 8**5
    assert full.factor_names == ("shape", "size", "rotation", "x", "y", "hue", "background")
    sprites = SingleObject(world, "dsprites-lite")
    assert sprites.factor_names == ("shape", "size", "rotation", "x", "y")
    assert sprites.factor_sizes == (4, 3, 8, 8, 8)
    shapes = SingleObject(world, preset="shapes3d-lite")
    assert shapes.factor_names == ("shape", "size", "x", "y", "hue", "background")
    rooms = SingleObject(world.replace(background="floor_wall"), "shapes3d-lite")
    assert rooms.factor_names[-2:] == ("floor", "wall")
    small = World(16, shapes=3, positions=5, hues=6, backgrounds=6)
    assert len(SingleObject(small, "shapes3d-lite")) == 8100


def test_single_objects_are_a_factor_dataset() -> None:
    dataset = SingleObject(World(16), "shapes3d-lite")
    assert isinstance(dataset, FactorDataset)
    images = dataset.images([0, 5, 9])
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == torch.uint8
    index = torch.tensor([0, 17, len(dataset) - 1])
    assert torch.equal(dataset.index(dataset.unravel(index)), index)
    assert dataset.factors(3).shape == (1, 6)


def test_example_and_images_show_the_factors() -> None:
    world = World()
    dataset = SingleObject(world)
    index = torch.randint(len(dataset), (40,), generator=stream_generator(0))
    factors = dataset.factors(index)
    images = dataset.images(index)
    for row in range(40):
        value = dict(zip(dataset.factor_names, factors[row].tolist(), strict=True))
        x, y = (int(32 * world.values(axis)[value[axis]]) for axis in ("x", "y"))
        # the middle pixel of every shape of the default world is covered
        assert images[row, y, x].tolist() == list(object_rgb(world.names("hue")[value["hue"]]))
        example = dataset[int(index[row])]
        assert float((example["image"].permute(1, 2, 0) * 255 - images[row]).abs().max()) <= 0.5001
        assert torch.equal(example["factors"], factors[row])


def test_no_two_pictures_of_the_grid_are_alike_but_the_flagged() -> None:
    world = World(shapes=8, textures=3, positions=2, hues=2, backgrounds=1)
    dataset = SingleObject(world, out="uint8")
    everything = dataset.all()
    flagged = ~dataset.is_canonical(torch.arange(len(dataset)))
    pictures = everything["image"].flatten(1).numpy()
    _, first, back = np.unique(pictures, axis=0, return_index=True, return_inverse=True)
    assert len(first) == int((~flagged).sum())
    # a flagged picture is the one whose rotation is the least that looks alike
    scene = dataset.scene(torch.arange(len(dataset)))
    canonical = world.index(world.canonical(scene))
    for group in (torch.from_numpy(back.reshape(-1)), canonical):
        assert len(torch.unique(group)) == len(first)
    pairs = torch.stack([torch.from_numpy(back.reshape(-1)), canonical], dim=1)
    assert len(torch.unique(pairs, dim=0)) == len(first)


def test_sprites_are_binary_and_differ_but_for_the_flagged() -> None:
    dataset = SingleObject(World(), "dsprites-lite")
    everything = dataset.all()["image"]
    assert everything.shape == (6144, 1, 32, 32)
    assert everything.unique().tolist() == [0.0, 1.0]
    canonical = dataset.is_canonical(torch.arange(len(dataset)))
    assert len(torch.unique(everything.flatten(1), dim=0)) == int(canonical.sum())


def test_plain_circles_report_rotation_zero_and_squares_their_own() -> None:
    dataset = SingleObject(World(positions=1, hues=1, backgrounds=1))
    factors = dataset.factors(torch.arange(len(dataset)))
    shape, rotation = factors[:, 0], factors[:, 2]
    assert int(rotation[shape == 0].max()) == 0
    assert int(rotation[shape == 1].max()) == 7
    assert World().rotation_period[:, 0].tolist() == [1, 2, 8, 2]


@pytest.mark.parametrize("factor", ["shape", "size", "x", "y", "hue", "background"])
def test_traversals_change_one_factor_over_all_its_values(factor: str) -> None:
    dataset = SingleObject(World(), "shapes3d-lite")
    column = dataset.factor_names.index(factor)
    line = dataset.traverse(12345, factor)
    factors = dataset.factors(line)
    assert factors[:, column].tolist() == list(range(dataset.factor_sizes[column]))
    others = [other for other in range(6) if other != column]
    assert bool((factors[:, others] == dataset.factors(12345)[:, others]).all())
    assert 12345 in line.tolist()


def test_neighbours_are_one_step_away_and_wrap_for_closed_circles() -> None:
    dataset = SingleObject(World())
    first = int(dataset.index(torch.tensor([[2, 0, 0, 0, 3, 7, 0]])))
    steps = {
        name: dataset.unravel(dataset.neighbours(first, name))[:, c] for c, name in enumerate(dataset.factor_names)
    }
    assert steps["rotation"].tolist() == [7, 1]
    assert steps["hue"].tolist() == [6, 0]
    assert steps["x"].tolist() == [1]
    assert steps["y"].tolist() == [2, 4]
    assert steps["size"].tolist() == [1]


def test_fixed_factors_do_not_vary() -> None:
    world = World()
    dataset = SingleObject(world, fixed={"shape": 2, "background": 5})
    assert "shape" not in dataset.factor_names
    assert "background" not in dataset.factor_names
    scene = dataset.scene(torch.arange(0, len(dataset), 999))
    assert set(scene["shape"].tolist()) == {2}
    assert set(scene["background"].tolist()) == {5}


def test_same_seed_and_step_is_the_same_batch_and_others_differ() -> None:
    dataset = SingleObject(World(16))
    loader = dataset.loader(batch_size=8, steps=5, seed=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    assert torch.equal(batches[4]["image"], dataset.loader(8, 9, seed=3)[4]["image"])
    assert torch.equal(batches[4]["image"], next(iter(dataset.loader(8, 5, seed=3, start=4)))["image"])
    indices = [batches[0]["index"], batches[1]["index"], dataset.loader(8, 5, seed=4)[0]["index"]]
    indices.append(dataset.loader(8, 5, seed=3, stream="test")[0]["index"])
    assert len({tuple(index.tolist()) for index in indices}) == 4
    assert torch.equal(batches[0]["image"], dataset.take(batches[0]["index"])["image"])


def test_sample_is_uniform_over_the_grid() -> None:
    dataset = SingleObject(World(16, positions=2, hues=2, backgrounds=1))
    drawn = dataset.sample(20_000, stream_generator(0))
    for column, size in enumerate(dataset.factor_sizes):
        if dataset.factor_names[column] != "rotation":
            counts = torch.bincount(drawn["factors"][:, column], minlength=size) / 20_000
            assert float((counts - 1 / size).abs().max()) < 0.02


def test_dtypes_and_ranges() -> None:
    world = World(16)
    index = torch.arange(0, 4000, 500)
    base = SingleObject(world).take(index)["image"]
    torch.testing.assert_close(SingleObject(world, range="-11").take(index)["image"], base * 2 - 1)
    whole = SingleObject(world, out="uint8")
    assert torch.equal(whole.take(index)["image"].permute(0, 2, 3, 1), whole.images(index))
    part = whole.dataset("iid", "test")
    assert part[0]["image"].dtype == torch.uint8


def test_noise_of_a_picture_does_not_depend_on_its_company() -> None:
    dataset = SingleObject(World(16, noise=0.1), seed=5)
    together = dataset.images([7, 8, 9])
    assert torch.equal(dataset.images(8)[0], together[1])
    assert not torch.equal(SingleObject(World(16, noise=0.1), seed=6).images(8)[0], together[1])


def test_a_split_works_in_a_dataloader() -> None:
    dataset = SingleObject(World(16), preset="shapes3d-lite").dataset(split="iid", part="train")
    batch = next(iter(DataLoader(dataset, batch_size=6)))
    assert batch["image"].shape == (6, 3, 16, 16)
    assert batch["factors"].shape == (6, 6)
    assert torch.equal(batch["image"][2], dataset[2]["image"])
    assert torch.equal(batch["factors"][2], dataset.dataset.factors(dataset.indices[2])[0])
    drawn = dataset.batch(50, stream_generator(0))
    assert set(drawn["index"].tolist()) <= set(dataset.indices.tolist())


def test_to_npz_writes_the_keys_of_dsprites(tmp_path: Path) -> None:
    world = World(16, positions=4)
    dataset = SingleObject(world, "dsprites-lite")
    path = tmp_path / "sprites.npz"
    dataset.to_npz(path, style="dsprites")
    plain = np.load(path, allow_pickle=False)
    assert set(plain.files) == {"imgs", "latents_classes", "latents_values", "metadata"}
    assert plain["imgs"].shape == (len(dataset), 16, 16)
    assert plain["imgs"].dtype == np.uint8
    assert set(np.unique(plain["imgs"])) == {0, 1}
    assert np.array_equal(plain["latents_classes"][:, 1:], dataset.unravel(torch.arange(len(dataset))).numpy())
    # the lines with which code for the real file begins
    real = np.load(path, allow_pickle=True, encoding="latin1")
    metadata = real["metadata"][()]
    sizes = metadata["latents_sizes"]
    bases = np.concatenate((sizes[::-1].cumprod()[::-1][1:], np.array([1])))
    latents = np.array([0, 2, 1, 3, 2, 1])
    image = real["imgs"][np.dot(latents, bases)]
    assert np.array_equal(
        image * 255, dataset.images(dataset.index(torch.from_numpy(latents[None, 1:])))[0, ..., 0].numpy()
    )
    values = real["latents_values"][np.dot(latents, bases)]
    assert values.tolist() == pytest.approx(
        [1.0, 3.0, 0.17, float(world.values("rotation")[3]), *world.values("x")[[2, 1]].tolist()]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "mpi3d"}, "preset must be one of"),
        ({"fixed": {"colour": 1}}, "unknown: colour"),
        ({"fixed": {"hue": 8}}, "'hue' must lie"),
        ({"out": "int8"}, "out must be"),
        ({"out": "uint8", "range": "-11"}, "out must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SingleObject(World(), **arguments)


def test_other_bad_input_is_refused(tmp_path: Path) -> None:
    dataset = SingleObject(World())
    with pytest.raises(ValueError, match="index must lie"):
        dataset.images([len(dataset)])
    with pytest.raises(TypeError, match="integers"):
        dataset.images(torch.tensor([0.5]))
    with pytest.raises(IndexError, match="item must lie"):
        dataset[len(dataset)]
    with pytest.raises(ValueError, match="factor must be one of"):
        dataset.traverse(0, "weight")
    with pytest.raises(ValueError, match="under 200000"):
        dataset.all()
    with pytest.raises(ValueError, match="style must be"):
        dataset.to_npz(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="leave a factor"):
        SingleObject(World(shapes=1, sizes=1, rotations=1, positions=1, hues=1, backgrounds=1))
    with pytest.raises(ValueError, match="part must be one of"):
        dataset.dataset("iid", "validation")
    with pytest.raises(ValueError, match="values below"):
        dataset.index(torch.tensor([[9, 0, 0, 0, 0, 0, 0]]))
    with pytest.raises(TypeError, match="int64"):
        dataset.index(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="batch_size and steps"):
        dataset.loader(0, 1)
