"""dSprites, Shapes3D and MPI3D, read from the files that their authors publish.

Each file enumerates the full grid of its factors in row-major order, so a place in the file is a joint value of the
factors. Nothing is downloaded and nothing is unpickled.

    dSprites   npz   imgs (737280, 64, 64) of 0 and 1     color 1, shape 3, scale 6, orientation 40, posX 32, posY 32
    Shapes3D   h5    images (480000, 64, 64, 3), labels   floor hue 10, wall hue 10, object hue 10, scale 8, shape 4, orientation 15
    MPI3D      npz   images (1036800, 64, 64, 3)          object color 6, shape 6, size 2, camera 3, background 3, axes 40 and 40
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from headgate.data.factors.protocol import FactorGrid, Indices
from headgate.errors import DataError, MissingExtraError

__all__ = ["MPI3D", "DSprites", "Shapes3D"]

_ROWS_AT_ONCE = 4096


class DSprites(FactorGrid):
    """dSprites (Matthey et al., 2017), or a file of the same layout such as ``SingleObject.to_npz`` writes.

    Images are kept as single bits (360 MiB for the real file) and come as 0 and 255.

    Args:
        path: ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``.

    Raises:
        DataError: no such file, another layout, or latents that are not the row-major grid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        classes = _whole_array(path, "latents_classes")
        names = ("color", "shape", "scale", "orientation", "posX", "posY")
        if classes.ndim != 2 or classes.shape[1] != len(names):
            raise DataError(f"{path}: latents_classes must have shape (images, {len(names)}), got {classes.shape}")
        super().__init__(names, _sizes_of(path, classes), cyclic=("orientation",))
        self._bits, self._shape = _packed_images(path, "imgs")
        if self._shape[0] != len(self):
            raise DataError(f"{path}: imgs must hold {len(self)} images, got {self._shape[0]}")

    def images(self, index: Indices) -> UInt8[Tensor, "count height width 1"]:
        """Give images of 0 and 255."""
        pixels = self._shape[1] * self._shape[2]
        bits = np.unpackbits(self._bits[self.places(index).numpy()], axis=1, count=pixels)
        return torch.from_numpy(bits * np.uint8(255)).view(-1, self._shape[1], self._shape[2], 1)


class Shapes3D(FactorGrid):
    """Shapes3D (Burgess and Kim, 2018). Images are read from the file when they are asked for.

    Args:
        path: ``3dshapes.h5``.

    Raises:
        DataError: no such file, another layout, or labels that are not the row-major grid.
        MissingExtraError: h5py is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
        with _h5_file(self.path) as file:
            for name in ("images", "labels"):
                if name not in file:
                    raise DataError(f"{path}: holds no {name!r}; it has {', '.join(file)}")
            labels, self._shape = np.asarray(file["labels"]), tuple(file["images"].shape)
        if labels.ndim != 2 or labels.shape[1] != len(names):
            raise DataError(f"{path}: labels must have shape (images, {len(names)}), got {labels.shape}")
        classes = np.stack([np.unique(column, return_inverse=True)[1] for column in labels.T], axis=1)
        super().__init__(names, _sizes_of(path, classes), cyclic=names[:3])
        if len(self._shape) != 4 or self._shape[0] != len(self):
            raise DataError(f"{path}: images must have shape ({len(self)}, height, width, 3), got {self._shape}")

    def images(self, index: Indices) -> UInt8[Tensor, "count height width 3"]:
        """Read images from the file."""
        wanted, back = np.unique(self.places(index).numpy(), return_inverse=True)
        if len(wanted) == 0:
            return torch.zeros(0, *self._shape[1:], dtype=torch.uint8)
        with _h5_file(self.path) as file:
            return torch.from_numpy(file["images"][wanted][back])


class MPI3D(FactorGrid):
    """MPI3D (Gondal et al., "On the transfer of inductive bias from simulation to the real world", NeurIPS 2019).

    A file whose array is stored without compression is mapped rather than read; the real one takes 12 GiB.

    Args:
        path: ``mpi3d_toy.npz``, ``mpi3d_realistic.npz`` or ``real.npz``.
        factor_sizes: another grid, e.g. (4, 4, 2, 3, 3, 40, 40) for ``real3d_complicated_shapes_ordered.npz``.

    Raises:
        DataError: no such file, another layout or another number of images.
    """

    def __init__(self, path: str | os.PathLike[str], factor_sizes: Sequence[int] = (6, 6, 2, 3, 3, 40, 40)) -> None:
        names = (
            "object_color",
            "object_shape",
            "object_size",
            "camera_height",
            "background_color",
            "horizontal_axis",
            "vertical_axis",
        )
        if len(factor_sizes) != len(names):
            raise ValueError(f"factor_sizes must have {len(names)} entries, got {tuple(factor_sizes)}")
        super().__init__(names, factor_sizes)
        self._images = _mapped_array(path, "images")
        if self._images.ndim != 4 or len(self._images) != len(self) or self._images.dtype != np.uint8:
            raise DataError(
                f"{path}: images must be uint8 of shape ({len(self)}, height, width, 3), "
                f"got {self._images.dtype} {self._images.shape}"
            )

    def images(self, index: Indices) -> UInt8[Tensor, "count height width 3"]:
        """Give images."""
        return torch.from_numpy(np.array(self._images[self.places(index).numpy()]))


def _sizes_of(path: str | os.PathLike[str], classes: Int[np.ndarray, "images factors"]) -> list[int]:
    if len(classes) == 0:
        raise DataError(f"{path}: holds no images")
    sizes = [int(size) for size in classes.max(axis=0) + 1]
    grid = np.stack(np.unravel_index(np.arange(int(np.prod(sizes))), sizes), axis=1)
    if not np.array_equal(grid, classes):
        raise DataError(f"{path}: the factors must enumerate the grid of {tuple(sizes)} in row-major order, and do not")
    return sizes


def _member(path: str | os.PathLike[str], name: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an npz file: {error}") from error
    if f"{name}.npy" not in archive.namelist():
        members = ", ".join(member.removesuffix(".npy") for member in archive.namelist())
        archive.close()
        raise DataError(f"{path}: holds no {name!r}; it has {members}")
    return archive, archive.getinfo(f"{name}.npy")


def _array_header(path: str | os.PathLike[str], name: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{path}: {name!r} is no array: {error}") from error
    if fortran or dtype.hasobject:
        raise DataError(f"{path}: {name!r} must be a plain array in C order, got {dtype}, fortran_order={fortran}")
    return shape, dtype


def _whole_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    archive, member = _member(path, name)
    with archive, archive.open(member) as file:
        shape, dtype = _array_header(path, name, file)
        data = _read(path, name, file, int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _mapped_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    archive, member = _member(path, name)
    with archive:
        if member.compress_type != zipfile.ZIP_STORED:
            return _whole_array(path, name)
        with archive.open(member) as file:
            shape, dtype = _array_header(path, name, file)
            header = file.tell()
        # The local header's own lengths tell where the data begin (they may differ from the central directory's).
        with open(path, "rb") as raw:
            raw.seek(member.header_offset + 26)
            lengths = raw.read(4)
        start = (
            member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        )
    if member.file_size < header + int(np.prod(shape)) * dtype.itemsize:
        raise DataError(f"{path}: {name!r} is cut short")
    return np.memmap(path, dtype=dtype, mode="r", offset=start + header, shape=shape)


def _packed_images(
    path: str | os.PathLike[str], name: str
) -> tuple[UInt8[np.ndarray, "images bytes"], tuple[int, ...]]:
    archive, member = _member(path, name)
    with archive, archive.open(member) as file:
        shape, dtype = _array_header(path, name, file)
        if len(shape) != 3 or dtype != np.uint8:
            raise DataError(f"{path}: {name!r} must be uint8 of shape (images, height, width), got {dtype} {shape}")
        pixels = shape[1] * shape[2]
        packed = np.empty((shape[0], -(-pixels // 8)), dtype=np.uint8)
        for first in range(0, shape[0], _ROWS_AT_ONCE):
            rows = min(_ROWS_AT_ONCE, shape[0] - first)
            block = np.frombuffer(_read(path, name, file, rows * pixels), dtype=np.uint8).reshape(rows, pixels)
            if block.max(initial=0) > 1:
                raise DataError(f"{path}: {name!r} must hold 0 and 1, got {int(block.max())}")
            packed[first : first + rows] = np.packbits(block, axis=1)
    return packed, shape


def _read(path: str | os.PathLike[str], name: str, file: IO[bytes], count: int) -> bytes:
    try:
        data = file.read(count)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {name!r} cannot be read: {error}") from error
    if len(data) < count:
        raise DataError(f"{path}: {name!r} is cut short")
    return data


def _h5_file(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "files", "reading Shapes3D") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an h5 file: {error}") from error
