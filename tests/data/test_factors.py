"""Readers of public files with known factors, on small files of the same layout."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from headgate.data.factors import (
    MPI3D,
    ClevrFolder,
    CocoCaptions,
    DSprites,
    FactorDataset,
    FactorGrid,
    FactorSubset,
    PopeQuestions,
    Shapes3D,
)
from headgate.data.scenes import SingleObject, World
from headgate.data.seeding import stream_generator
from headgate.errors import DataError

SPRITES = (1, 3, 2, 4, 3, 2)
ROOMS = (2, 3, 2, 2, 4, 3)
ROBOTS = (2, 2, 2, 1, 3, 2, 2)


def grid(sizes: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(int(np.prod(sizes))), sizes), axis=1).astype(np.int64)


def pixels(count: int, *shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, (count, *shape), dtype=np.uint8)


def write_sprites(path: Path, **changes: Any) -> np.ndarray:
    classes = grid(SPRITES)
    images = pixels(len(classes), 9, 7, high=2)
    arrays = {"imgs": images, "latents_classes": classes, "metadata": np.array({"a": 1}, dtype=object)} | changes
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return images


def write_rooms(path: Path, **changes: Any) -> np.ndarray:
    classes = grid(ROOMS)
    images = pixels(len(classes), 6, 5, 3)
    labels = classes / 10.0
    labels[:, 5] = classes[:, 5] * 15.0 - 30.0  # the real file's orientation runs from -30 to 30 degrees
    with h5py.File(path, "w") as file:
        for name, value in ({"images": images, "labels": labels} | changes).items():
            if value is not None:
                file[name] = value
    return images


def test_dsprites_reads_images_and_factors_of_the_real_layout(tmp_path: Path) -> None:
    images = write_sprites(tmp_path / "d.npz")
    dataset = DSprites(tmp_path / "d.npz")
    assert isinstance(dataset, FactorDataset)
    assert dataset.factor_names == ("color", "shape", "scale", "orientation", "posX", "posY")
    assert dataset.factor_sizes == SPRITES
    assert len(dataset) == len(images) == 144
    index = torch.tensor([5, 0, 143, 5])
    assert np.array_equal(dataset.images(index)[..., 0].numpy(), images[index.numpy()] * 255)
    assert np.array_equal(dataset.factors(index).numpy(), grid(SPRITES)[index.numpy()])
    assert torch.equal(dataset.index(dataset.factors(torch.arange(144))), torch.arange(144))


def test_dsprites_reads_what_single_objects_write(tmp_path: Path) -> None:
    ours = SingleObject(World(16, positions=4), "dsprites-lite")
    ours.to_npz(tmp_path / "ours.npz")
    theirs = DSprites(tmp_path / "ours.npz")
    assert theirs.factor_sizes == (1, *ours.factor_sizes)
    index = torch.randint(len(ours), (50,), generator=stream_generator(0))
    assert torch.equal(theirs.images(index), ours.images(index))
    assert torch.equal(theirs.unravel(index)[:, 1:], ours.unravel(index))


def test_shapes3d_reads_images_and_factors_of_the_real_layout(tmp_path: Path) -> None:
    images = write_rooms(tmp_path / "s.h5")
    dataset = Shapes3D(tmp_path / "s.h5")
    assert isinstance(dataset, FactorDataset)
    assert dataset.factor_names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    assert dataset.factor_sizes == ROOMS
    index = torch.tensor([9, 3, 9, 200, 0])
    assert np.array_equal(dataset.images(index).numpy(), images[index.numpy()])
    assert np.array_equal(dataset.factors(index).numpy(), grid(ROOMS)[index.numpy()])
    assert dataset.images(torch.zeros(0, dtype=torch.int64)).shape == (0, 6, 5, 3)
    # hues close to a circle, the camera's orientation does not
    assert [len(dataset.neighbours(0, name)) for name in dataset.factor_names] == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_mpi3d_reads_images_of_the_real_layout_mapped_or_not(tmp_path: Path, write: Any) -> None:
    images = pixels(int(np.prod(ROBOTS)), 4, 5, 3)
    write(tmp_path / "m.npz", images=images)
    dataset = MPI3D(tmp_path / "m.npz", factor_sizes=ROBOTS)
    assert isinstance(dataset, FactorDataset)
    assert isinstance(dataset._images, np.memmap) == (write is np.savez)
    index = torch.tensor([0, 47, 13])
    assert np.array_equal(dataset.images(index).numpy(), images[index.numpy()])
    assert np.array_equal(dataset.factors(index).numpy(), grid(ROBOTS)[index.numpy()])
    dataset.images(0).zero_()
    assert np.array_equal(dataset.images(0)[0].numpy(), images[0])


def test_default_grid_of_mpi3d_has_the_published_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", images=pixels(4, 4, 5, 3))
    with pytest.raises(DataError, match=r"shape \(1036800, height, width, 3\)"):
        MPI3D(tmp_path / "m.npz")


def test_traversals_and_neighbours_of_a_grid_by_hand() -> None:
    dataset = FactorGrid(("scale", "orientation", "posX"), (2, 4, 3), cyclic=("orientation",))
    assert dataset.traverse(16, "orientation").tolist() == [13, 16, 19, 22]
    assert dataset.neighbours(13, "orientation").tolist() == [22, 16]
    assert dataset.neighbours(13, "posX").tolist() == [12, 14]
    assert dataset.neighbours(12, "posX").tolist() == [13]
    assert dataset.neighbours(13, "scale").tolist() == [1]
    assert FactorGrid(("hue", "x"), (2, 1), cyclic=("hue",)).neighbours(0, "hue").tolist() == [1]
    assert FactorGrid(("hue", "x"), (2, 1), cyclic=("hue",)).neighbours(0, "x").tolist() == []


def test_subsets_give_examples_of_any_factor_dataset(tmp_path: Path) -> None:
    images = write_rooms(tmp_path / "s.h5")
    dataset = Shapes3D(tmp_path / "s.h5")
    subset = FactorSubset(dataset, [7, 3, 100], range="-11")
    assert len(subset) == 3
    example = subset[1]
    np.testing.assert_allclose(example["image"].permute(1, 2, 0).numpy(), images[3] / 127.5 - 1, atol=1e-6)
    assert example["factors"].tolist() == grid(ROOMS)[3].tolist()
    assert torch.equal(subset[-1]["image"], subset[2]["image"])
    several = subset.__getitems__([2, 0])
    assert torch.equal(several[0]["image"], subset[2]["image"])
    assert len(several) == 2
    assert FactorSubset(dataset, [7], out="uint8")[0]["image"].dtype == torch.uint8
    loader = subset.loader(batch_size=5, steps=3, seed=1)
    assert torch.equal(loader[2]["index"], list(loader)[2]["index"])
    assert set(loader[0]["index"].tolist()) <= {7, 3, 100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imgs": None}, "holds no 'imgs'"),
        ({"latents_classes": None}, "holds no 'latents_classes'"),
        ({"latents_classes": grid(SPRITES)[:, :5]}, r"must have shape \(images, 6\)"),
        ({"latents_classes": grid(SPRITES)[::-1]}, "row-major"),
        ({"latents_classes": grid(SPRITES)[:0]}, "holds no images"),
        ({"imgs": pixels(144, 9, 7)}, "must hold 0 and 1"),
        ({"imgs": pixels(143, 9, 7, high=2)}, "must hold 144 images, got 143"),
        ({"imgs": pixels(144, 9, 7, 3, high=2)}, "must be uint8 of shape"),
        ({"imgs": np.array([{"a": 1}], dtype=object)}, "plain array"),
    ],
)
def test_wrong_dsprites_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_sprites(tmp_path / "d.npz", **changes)
    with pytest.raises(DataError, match=message):
        DSprites(tmp_path / "d.npz")


def test_missing_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    for reader in (DSprites, Shapes3D, MPI3D):
        with pytest.raises(DataError, match="cannot be read"):
            reader(tmp_path / "missing")
        (tmp_path / "text").write_text("hello")
        with pytest.raises(DataError, match="cannot be read"):
            reader(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("latents_classes.npy", b"hello world")
    with pytest.raises(DataError, match="is no array"):
        DSprites(tmp_path / "z.npz")
    whole = tmp_path / "m.npz"
    np.savez(whole, images=pixels(96, 4, 5, 3))
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "cut.npz", "w") as cut:
        cut.writestr("images.npy", archive.read("images.npy")[:-10])
    with pytest.raises(DataError, match="cut short"):
        MPI3D(tmp_path / "cut.npz", factor_sizes=ROBOTS)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "packed.npz", "w", zipfile.ZIP_DEFLATED) as cut:
        cut.writestr("images.npy", archive.read("images.npy")[:-10])
    with pytest.raises(DataError, match="cut short"):
        MPI3D(tmp_path / "packed.npz", factor_sizes=ROBOTS)
    with pytest.raises(ValueError, match="must have 7 entries"):
        MPI3D(whole, factor_sizes=(6, 6, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "holds no 'images'"),
        ({"labels": None}, "holds no 'labels'"),
        ({"labels": grid(ROOMS)[:, :4]}, r"must have shape \(images, 6\)"),
        ({"labels": grid(ROOMS)[::-1]}, "row-major"),
        ({"images": pixels(10, 6, 5, 3)}, "must have shape"),
    ],
)
def test_wrong_shapes3d_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_rooms(tmp_path / "s.h5", **changes)
    with pytest.raises(DataError, match=message):
        Shapes3D(tmp_path / "s.h5")


def test_subsets_refuse_bad_input(tmp_path: Path) -> None:
    dataset = SingleObject(World(16), "shapes3d-lite")
    with pytest.raises(ValueError, match="at least one image"):
        FactorSubset(dataset, [])
    with pytest.raises(ValueError, match="out must be"):
        FactorSubset(dataset, [0], out="uint8", range="-11")
    with pytest.raises(IndexError, match="item must lie"):
        FactorSubset(dataset, [0])[1]


# Pictures of several objects


def thing(**changes: Any) -> dict[str, Any]:
    return {
        "shape": "cube",
        "color": "red",
        "material": "metal",
        "size": "large",
        "3d_coords": [1.0, -2.0, 0.7],
    } | changes


def write_clevr(folder: Path, ending: str = "") -> tuple[list[np.ndarray], list[np.ndarray]]:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    pictures, labels = list(pixels(2, 8, 10, 3)), list(pixels(2, 8, 10, high=3))
    scenes = [
        {"image_filename": "a_0.png", "objects": [thing(), thing(shape="sphere", color="blue", size="small")]},
        {"image_filename": "a_1.png", "objects": [thing(material="rubber")]},
    ]
    for scene, picture, label in zip(scenes, pictures, labels, strict=True):
        Image.fromarray(picture).save(folder / "images" / str(scene["image_filename"]))
        Image.fromarray(label).save(folder / "masks" / str(scene["image_filename"]).replace(".png", f"{ending}.png"))
    (folder / "scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))
    return pictures, labels


@pytest.mark.parametrize("ending", ["", "_flat", "_mask"])
def test_clevr_gives_an_object_table_and_labels(tmp_path: Path, ending: str) -> None:
    pictures, labels = write_clevr(tmp_path, ending)
    dataset = ClevrFolder(tmp_path / "images", tmp_path / "scenes.json", tmp_path / "masks", slots=3)
    assert dataset.vocabulary == {
        "shape": ("cube", "sphere"),
        "color": ("blue", "red"),
        "material": ("metal", "rubber"),
        "size": ("large", "small"),
    }
    batch = dataset.batch([1, 0])
    np.testing.assert_allclose(batch["image"].permute(0, 2, 3, 1).numpy() * 255, np.stack(pictures[::-1]), atol=1e-4)
    assert np.array_equal(batch["labels"].numpy(), np.stack(labels[::-1]))
    assert batch["present"].tolist() == [[True, False, False], [True, True, False]]
    assert batch["factors"][1].tolist() == [[0, 1, 0, 0], [1, 0, 0, 1], [-1] * 4]
    assert batch["factors"][0, 0].tolist() == [0, 1, 1, 0]
    assert batch["coords"][1, 1].tolist() == pytest.approx([1.0, -2.0, 0.7])
    assert torch.equal(dataset[0]["factors"], batch["factors"][1])
    assert len(dataset) == 2
    assert torch.equal(dataset[-1]["factors"], batch["factors"][0])


def test_clevrtex_has_a_file_per_scene_and_no_colours(tmp_path: Path) -> None:
    write_clevr(tmp_path)
    for name in ("a_0", "a_1"):
        scene = {"objects": [{key: value for key, value in thing().items() if key != "color"}]}
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.json").write_text(json.dumps(scene))
    dataset = ClevrFolder(tmp_path / "images", tmp_path / "texts")
    assert [scene["image_filename"] for scene in dataset.scenes] == ["a_0.png", "a_1.png"]
    assert dataset.vocabulary["color"] == ()
    assert dataset[0]["factors"].tolist() == [[0, -1, 0, 0]]
    assert "labels" not in dataset[0]


def test_coloured_masks_are_numbered_with_black_as_the_ground(tmp_path: Path) -> None:
    write_clevr(tmp_path)
    colours = np.zeros((8, 10, 3), dtype=np.uint8)
    colours[2:4], colours[5:7] = (0, 0, 200), (90, 0, 0)
    Image.fromarray(colours).save(tmp_path / "masks" / "a_0.png")
    labels = ClevrFolder(tmp_path / "images", tmp_path / "scenes.json", tmp_path / "masks")[0]["labels"]
    assert labels[:, 0].tolist() == [0, 0, 1, 1, 0, 2, 2, 0]
    colours[:] = (1, 2, 3)
    Image.fromarray(colours).save(tmp_path / "masks" / "a_0.png")
    labels = ClevrFolder(tmp_path / "images", tmp_path / "scenes.json", tmp_path / "masks")[0]["labels"]
    assert labels.unique().tolist() == [1]


def test_wrong_clevr_folders_are_refused(tmp_path: Path) -> None:
    write_clevr(tmp_path)
    images, scenes = tmp_path / "images", tmp_path / "scenes.json"
    with pytest.raises(ValueError, match="slots must be at least the 2 objects"):
        ClevrFolder(images, scenes, slots=1)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        ClevrFolder(images, tmp_path / "missing.json")
    with pytest.raises(DataError, match="no mask for"):
        _ = ClevrFolder(images, scenes, images.parent / "nowhere")[0]
    (images / "a_1.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        _ = ClevrFolder(images, scenes)[1]
    with pytest.raises(IndexError, match="item must lie"):
        _ = ClevrFolder(images, scenes)[2]
    Image.fromarray(pixels(1, 4, 4, 3)[0]).save(images / "a_1.png")
    with pytest.raises(DataError, match="one size"):
        ClevrFolder(images, scenes).batch([0, 1])
    for content, message in [
        ({"pictures": []}, "list 'scenes'"),
        ({"scenes": []}, "holds no scenes"),
        ({"scenes": [{"objects": []}]}, "must have 'image_filename'"),
        ({"scenes": [{"image_filename": "a", "objects": [{"shape": "cube"}]}]}, "3d_coords"),
    ]:
        scenes.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            ClevrFolder(images, scenes)


# Pictures with text


def test_coco_captions_belong_to_their_images(tmp_path: Path) -> None:
    picture = pixels(1, 5, 6, 3)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 9, "file_name": "a.png"}, {"id": 8, "file_name": "c.png"}],
        "annotations": [
            {"image_id": 9, "caption": "A cat. "},
            {"image_id": 7, "caption": "A dog."},
            {"image_id": 9, "caption": "Some cat."},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    dataset = CocoCaptions(tmp_path, tmp_path / "captions.json")
    assert len(dataset) == 2
    assert dataset[1]["caption"] == ["A cat.", "Some cat."]
    np.testing.assert_allclose(dataset[1]["image"].permute(1, 2, 0).numpy() * 255, picture, atol=1e-4)
    with pytest.raises(DataError, match="cannot be read as an image"):
        _ = dataset[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello", "cannot be read as JSON"),
        ('{"images": []}', "failed at 'annotations'"),
        ('{"images": [], "annotations": [{"caption": "x"}]}', "failed at 'image_id'"),
        ('{"images": [], "annotations": []}', "no image with a caption"),
    ],
)
def test_wrong_coco_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DataError, match=message):
        CocoCaptions(tmp_path, tmp_path / "c.json")


def test_pope_questions_have_answers(tmp_path: Path) -> None:
    Image.fromarray(pixels(1, 5, 6, 3)[0]).save(tmp_path / "a.png")
    lines = [
        {"question_id": 1, "image": "a.png", "text": "Is there a cat in the image?", "label": "yes"},
        {"question_id": 2, "image": "a.png", "text": "Is there a dog in the image?", "label": "No"},
    ]
    (tmp_path / "q.json").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    dataset = PopeQuestions(tmp_path, tmp_path / "q.json")
    assert [dataset[row]["answer"] for row in range(len(dataset))] == [True, False]
    assert dataset[0]["text"] == "Is there a cat in the image?"
    assert dataset[1]["image"].shape == (3, 5, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ('{"image": "a", "text": "b", "label": "maybe"}', "line 1 must be"),
        ('{"image": "a", "text": "b", "label": "yes"}\n{"image": "a"}', "line 2 must be"),
        ("[1]", "line 1 must be"),
    ],
)
def test_wrong_pope_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(DataError, match=message):
        PopeQuestions(tmp_path, tmp_path / "q.json")
    with pytest.raises(DataError, match="cannot be read"):
        PopeQuestions(tmp_path, tmp_path / "missing.json")
