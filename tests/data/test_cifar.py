"""CIFAR from Parquet files that the tests write: PNG images as on the hub, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from headgate.data import cifar
from headgate.data.cifar import (
    CIFAR10_CLASSES,
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_CLASSES,
    CIFAR100_COARSE_CLASSES,
    CIFAR100_MEAN,
    Cifar,
    random_crop_flip,
)
from headgate.data.seeding import stream_generator
from headgate.errors import DataError


def _pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def _encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _images(encoded: Sequence[bytes | None]) -> pa.Array:
    return pa.array(
        [{"bytes": data, "path": None} for data in encoded], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )


def _write(path: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def _cifar10(path: Path, count: int = 6, seed: int = 0) -> np.ndarray:
    pixels = _pixels(count, seed)
    _write(path, img=_images([_encode(image) for image in pixels]), label=[index % 10 for index in range(count)])
    return pixels


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_png_pixels_come_back_exactly(tmp_path: Path) -> None:
    pixels = _cifar10(tmp_path / "train.parquet", count=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Cifar(tmp_path)
    assert torch.equal(data.images, _channels_first(pixels))
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [*range(10), 0, 1]
    assert data.labels.dtype == torch.int64
    assert data.class_names == CIFAR10_CLASSES
    assert data.image_format == "PNG"
    assert torch.equal(Cifar(tmp_path / "train.parquet").images, data.images)


def test_the_split_is_found_at_any_depth_with_shards_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "plain_text"
    first = _cifar10(folder / "train-00000-of-00002.parquet", seed=1)
    second = _cifar10(folder / "train-00001-of-00002.parquet", seed=2)
    test = _cifar10(folder / "test-00000-of-00001.parquet", seed=3)
    assert torch.equal(Cifar(tmp_path).images, _channels_first(np.concatenate([first, second])))
    assert torch.equal(Cifar(tmp_path, "test").images, _channels_first(test))


def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    encoded = [_encode(image) for image in _pixels(2)]
    _write(tmp_path / "test.parquet", img=_images(encoded), fine_label=[99, 0], coarse_label=[3, 19])
    fine, coarse = Cifar(tmp_path, "test"), Cifar(tmp_path, "test", labels="coarse")
    assert fine.labels.tolist() == [99, 0]
    assert coarse.labels.tolist() == [3, 19]
    assert [fine.class_names[label] for label in fine.labels] == ["worm", "apple"]
    assert [coarse.class_names[label] for label in coarse.labels] == ["food_containers", "vehicles_2"]
    assert fine.mean == coarse.mean == CIFAR100_MEAN


def test_plain_bytes_in_a_column_called_image_work_too(tmp_path: Path) -> None:
    pixels = _pixels(3)
    _write(tmp_path / "train.parquet", image=[_encode(image) for image in pixels], label=pa.array([1, 2, 3], pa.int8()))
    data = Cifar(tmp_path)
    assert torch.equal(data.images, _channels_first(pixels))
    assert data.labels.tolist() == [1, 2, 3]
    assert data.labels.dtype == torch.int64


def test_class_names_of_the_hubs_metadata_go_first(tmp_path: Path) -> None:
    metadata = {"info": {"features": {"img": {"_type": "Image"}, "label": {"names": ["yes", "no"]}}}}
    images = _images([_encode(image) for image in _pixels(2)])
    _write(tmp_path / "train.parquet", metadata, img=images, label=[0, 1])
    assert Cifar(tmp_path).class_names == ("yes", "no")
    _write(tmp_path / "train.parquet", metadata, img=images, label=[0, 2])
    with pytest.raises(DataError, match=r"row 1: expected label in \[0, 2\), got 2"):
        Cifar(tmp_path)


def test_the_published_class_names_are_complete_and_sorted() -> None:
    assert (len(CIFAR10_CLASSES), len(CIFAR100_CLASSES), len(CIFAR100_COARSE_CLASSES)) == (10, 100, 20)
    for names in (CIFAR100_CLASSES, CIFAR100_COARSE_CLASSES):
        assert list(names) == sorted(set(names))


def test_jpeg_images_are_decoded_with_a_warning(tmp_path: Path) -> None:
    pixels = np.full((2, 32, 32, 3), 90, dtype=np.uint8)
    images = _images([_encode(pixels[0]), _encode(pixels[1], "JPEG")])
    _write(tmp_path / "train.parquet", img=images, label=[0, 1])
    with pytest.warns(UserWarning, match="JPEG images: their pixels differ from the published"):
        data = Cifar(tmp_path)
    assert data.image_format == "JPEG"
    assert torch.equal(data.images, torch.full((2, 3, 32, 32), 90, dtype=torch.uint8))


def test_an_item_is_standardised_and_a_batch_holds_items(tmp_path: Path) -> None:
    pixels = _cifar10(tmp_path / "train.parquet")
    data = Cifar(tmp_path)
    image, label = data[4]
    expected = (pixels[4].transpose(2, 0, 1) / 255 - np.reshape(CIFAR10_MEAN, (3, 1, 1))) / np.reshape(
        CIFAR10_STD, (3, 1, 1)
    )
    np.testing.assert_allclose(image.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert label == 4
    images, labels = data.batch([4, 0, -1])
    assert torch.equal(images, torch.stack([data[index][0] for index in (4, 0, -1)]))
    assert labels.tolist() == [4, 0, 5]
    scaled = Cifar(tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3)[4][0]
    np.testing.assert_allclose(scaled.numpy(), pixels[4].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    with pytest.raises(IndexError, match="got 6"):
        data[6]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_same_images_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    _cifar10(tmp_path / "train.parquet")
    data = Cifar(tmp_path)
    loaded = list(DataLoader(data, batch_size=4, num_workers=workers))
    assert torch.equal(torch.cat([images for images, _ in loaded]), data.batch(range(6))[0])
    assert torch.equal(torch.cat([labels for _, labels in loaded]), data.labels)


def test_an_augmented_batch_is_the_augmented_pixels_standardised(tmp_path: Path) -> None:
    _cifar10(tmp_path / "train.parquet")
    data = Cifar(tmp_path, mean=(0.0,) * 3, std=(1.0,) * 3)
    images, _ = data.batch([0, 1, 2], augment=stream_generator(0, "augment", 5))
    again = random_crop_flip(data.images[:3], stream_generator(0, "augment", 5))
    assert torch.equal(images, again.float() / 255)
    assert not torch.equal(images, data.batch([0, 1, 2], augment=stream_generator(0, "augment", 6))[0])


def test_crop_and_flip_equal_a_loop_over_images() -> None:
    images = torch.randint(1, 256, (40, 3, 9, 7), generator=stream_generator(1), dtype=torch.uint8)
    found = random_crop_flip(images, stream_generator(2), padding=2)
    seen = set()
    for image, ours in zip(images, found, strict=True):
        padded = torch.zeros(3, 13, 11, dtype=torch.uint8)
        padded[:, 2:-2, 2:-2] = image
        candidates = {
            (top, left, flip): padded[:, top : top + 9, left : left + 7].flip(-1)
            if flip
            else padded[:, top : top + 9, left : left + 7]
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
        }
        matches = [place for place, candidate in candidates.items() if torch.equal(candidate, ours)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(5))
    assert {place[2] for place in seen} == {False, True}


def test_crop_and_flip_give_the_same_bytes_on_every_machine() -> None:
    images = torch.arange(5 * 3 * 16 * 16).remainder(251).byte().reshape(5, 3, 16, 16)
    found = random_crop_flip(images, stream_generator(0, "augment", 0))
    assert (
        hashlib.sha256(found.numpy().tobytes()).hexdigest()
        == "fa1e4d4670823c1dbaee6ecb9361ea3b4297300310332b25c8c21241273b2ef9"
    )


def test_crop_and_flip_are_uniform() -> None:
    image = torch.arange(1, 26).reshape(1, 1, 5, 5).expand(20_000, 1, 5, 5)
    centre = random_crop_flip(image, stream_generator(3), padding=2)[:, 0, 2, 2]
    counts = centre.bincount(minlength=26)[1:]
    assert (counts - 800).abs().max() < 130  # 4.6 standard deviations of 28
    flipped = (random_crop_flip(image, stream_generator(4), padding=0)[:, 0, 0, 0] == 5).sum()
    assert abs(int(flipped) - 10_000) < 300


def test_crop_and_flip_keep_their_input_dtype_and_take_no_images() -> None:
    images = torch.rand(4, 3, 8, 8, generator=stream_generator(5))
    before = images.clone()
    assert random_crop_flip(images, stream_generator(6)).dtype == torch.float32
    assert torch.equal(images, before)
    assert random_crop_flip(images[:0], stream_generator(6)).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="images must have shape"):
        random_crop_flip(images[0], stream_generator(6))
    with pytest.raises(ValueError, match="padding must not be negative, got -1"):
        random_crop_flip(images, stream_generator(6), padding=-1)


def test_a_cache_gives_the_same_and_is_read_instead_of_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = [_encode(image) for image in _pixels(3)]
    path = _write(
        tmp_path / "data" / "train.parquet", img=_images(encoded), fine_label=[5, 6, 7], coarse_label=[1, 2, 3]
    )
    cache = tmp_path / "cache"
    plain = Cifar(path)
    first = Cifar(path, cache=cache)
    coarse = Cifar(path, labels="coarse", cache=cache)
    monkeypatch.setattr(cifar, "_decode_images", None)
    again = Cifar(path, cache=cache)
    for data in (first, again):
        assert torch.equal(data.images, plain.images)
        assert torch.equal(data.labels, plain.labels)
        assert data.class_names == plain.class_names
    assert coarse.labels.tolist() == [1, 2, 3]
    assert len(list(cache.iterdir())) == 2


def test_another_source_never_meets_a_cache_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _cifar10(tmp_path / "train.parquet", seed=1)
    Cifar(tmp_path, cache=cache)
    pixels = _cifar10(tmp_path / "train.parquet", seed=2)
    assert torch.equal(Cifar(tmp_path, cache=cache).images, _channels_first(pixels))
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cifar-[0-9a-f]{32}\.safetensors is no whole cache .*; delete it"):
        Cifar(tmp_path, cache=cache)


def test_a_folder_must_hold_the_split_whole_and_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no train\.parquet or train-\*\.parquet"):
        Cifar(tmp_path)
    with pytest.raises(DataError, match="does not exist; expected a Parquet file or a folder"):
        Cifar(tmp_path / "nowhere")
    _cifar10(tmp_path / "a" / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"all its shards .*, found a.train-00000-of-00002\.parquet"):
        Cifar(tmp_path)
    _cifar10(tmp_path / "b" / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"expected one train\.parquet or all its shards"):
        Cifar(tmp_path)
    test = _cifar10(tmp_path / "c" / "test.parquet")
    with pytest.raises(
        DataError, match=r"test\.parquet is named for the test split; expected a file of the train split"
    ):
        Cifar(tmp_path / "c" / "test.parquet")
    assert torch.equal(Cifar(tmp_path / "c" / "test.parquet", "test").images, _channels_first(test))


def test_files_that_are_no_whole_parquet_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    _cifar10(path)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", b"date,OT\n1,2\n", whole[: len(whole) // 2], whole[:-1], whole[100:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"train\.parquet is no whole Parquet file") as caught:
            Cifar(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"label": [0]}, "lacks the column img or image; found label"),
        ({"img": "good"}, "lacks the column label or fine_label; found img"),
        ({"img": "good", "label": [10]}, r"row 0: expected label in \[0, 10\), got 10"),
        ({"img": "good", "label": [-1]}, r"row 0: expected label in \[0, 10\), got -1"),
        ({"img": "good", "fine_label": [100]}, r"row 0: expected fine_label in \[0, 100\), got 100"),
        ({"img": "good", "label": ["cat"]}, "column 'label': expected an integer in every row, got string"),
        ({"img": "good", "label": pa.array([None], pa.int64())}, "got int64 with 1 rows missing"),
        (
            {"img": [3], "label": [0]},
            r"column 'img': expected encoded images \(bytes, or a struct with bytes\), got int64",
        ),
        ({"img": _images([None]), "label": [0]}, "row 0: the image is missing"),
        ({"img": _images([b"no image"]), "label": [0]}, "row 0: the image cannot be decoded"),
        ({"img": _images([_encode(_pixels(1)[0])[:-200]]), "label": [0]}, "row 0: the image cannot be decoded"),
        ({"img": _images([_encode(_pixels(1)[0], "BMP")]), "label": [0]}, "row 0: the image cannot be decoded"),
        ({"img": _images([_encode(_pixels(1)[0, :16])]), "label": [0]}, "RGB image of 32×32, got RGB of 32×16"),
        ({"img": _images([_encode(_pixels(1)[0, :, :, 0])]), "label": [0]}, "RGB image of 32×32, got L of 32×32"),
        ({"img": _images([]), "label": pa.array([], pa.int64())}, "holds no rows"),
    ],
)
def test_wrong_columns_labels_and_images_are_named(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    if columns.get("img") == "good":
        columns = {**columns, "img": _images([_encode(_pixels(1)[0])])}
    _write(tmp_path / "train.parquet", **columns)
    with pytest.raises(DataError, match=match) as caught:
        Cifar(tmp_path)
    assert "train.parquet" in str(caught.value)


def test_the_row_of_a_bad_image_is_counted_from_the_start_of_its_file(tmp_path: Path) -> None:
    encoded = [_encode(image) for image in _pixels(5)]
    encoded[3] = encoded[3][:50]
    _write(tmp_path / "train.parquet", img=_images(encoded), label=[0] * 5)
    with pytest.raises(DataError, match=r"train\.parquet, row 3: the image cannot be decoded"):
        Cifar(tmp_path)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    _cifar10(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        Cifar(tmp_path, "val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must be 'fine' or 'coarse', got 'super'"):
        Cifar(tmp_path, labels="super")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std positive"):
        Cifar(tmp_path, std=(1.0, 0.0, 1.0))
    with pytest.raises(DataError, match="lacks the column coarse_label; found img, label"):
        Cifar(tmp_path, labels="coarse")


def test_rows_of_the_real_cifar10_are_read(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "cifar10" / "test.parquet"
    if not source.is_file():
        pytest.skip(f"{source} is missing")
    table = pq.ParquetFile(source).read_row_group(1).slice(0, 300)
    pq.write_table(table, tmp_path / "test.parquet")
    encoded = [row["bytes"] for row in table["img"].to_pylist()]
    lossy = any(data.startswith(b"\xff\xd8") for data in encoded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if lossy else "error")
        data = Cifar(tmp_path, "test")
    assert data.images.shape == (300, 3, 32, 32)
    assert data.image_format == ("JPEG" if lossy else "PNG")
    assert data.labels.tolist() == table["label"].to_pylist()
    assert set(data.labels.tolist()) == set(range(10))
    paths = [row["path"] for row in table["img"].to_pylist()]
    if all(path and "/" in path for path in paths):
        assert [data.class_names[label] for label in data.labels] == [path.split("/")[0] for path in paths]
    for row in (0, 299):
        assert np.array_equal(
            data.images[row].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(encoded[row])))
        )
    images, _ = data.batch(range(300))
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
