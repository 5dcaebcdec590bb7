"""Run a model over a loader and keep the features of its layers."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from headgate.evaluate.checks import as_labels, check_choice, check_finite, normalize_rows
from headgate.evaluate.features import Features, FeatureWriter

__all__ = ["Layer", "Pool", "extract", "extract_layers"]

Layer: TypeAlias = str | Callable[[nn.Module, Any], Tensor] | None
Pool: TypeAlias = Literal["cls", "mean", "none", "auto"]


def extract(
    model: nn.Module,
    loader: Iterable[Any],
    layer: Layer = None,
    pool: Pool = "auto",
    normalize: bool = False,
    dtype: type[np.floating] = np.float32,
    *,
    preprocessing: str | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Features:
    """Run a model over a loader and collect the features of one layer.

    The model runs in eval mode without gradients, on the device where its parameters lie; afterwards every module is
    in the mode in which it was.

    Args:
        model: any module.
        loader: batches in a fixed order: a tensor ``x``, a tuple ``(x,)``, ``(x, y)`` or ``(x, y, ids)``, or a mapping
            with ``"x"`` and, if there, ``"y"`` and ``"ids"``. Where ``x`` is a mapping or a tuple itself, the model is
            called with its entries. A loader that shuffles is refused unless it hands out ids.
        layer: ``None`` takes the model's output; a string is the name of a submodule, as in ``model.named_modules()``,
            whose output is taken (in both cases the first entry of a tuple); a callable ``layer(model, x)`` returns
            the features itself.
        pool: from tokens ``(B, L, d)``: ``"cls"`` takes the first, ``"mean"`` the mean of all. From maps
            ``(B, d, ...)`` of four or more axes ``"mean"`` takes the mean over space. ``"none"`` keeps what comes.
            ``"auto"`` keeps ``(B, d)`` and takes the mean of everything else.
        normalize: divide every feature vector by its L2 norm.
        dtype: NumPy type of the result.
        preprocessing: what was done to the inputs, for the record; default the ``repr`` of the data set's
            ``transform``, where the loader has one.
        store: write the features to this file batch by batch, in float16, and return them memory-mapped.

    Returns:
        Features; ids are 0 … N - 1 where the loader hands out none.

    Raises:
        TypeError: a batch of another form, or a layer that gives no tensor.
        ValueError: a shuffled loader without ids, an unknown layer or pooling, no batch, a value that is not finite,
            or a feature of norm zero with ``normalize=True`` (layer and row are named).
    """
    _check_dtype(dtype)
    passes = _Passes(model, loader, {"": layer}, pool, normalize, preprocessing)
    if store is None:
        blocks = [batch[""].astype(dtype) for batch in passes]
        y, ids = passes.labels()
        return Features(np.concatenate(blocks), y, ids, {**passes.meta(""), "dtype": np.dtype(dtype).name})
    # Closing ends eval mode at once where the writer refuses a batch.
    with FeatureWriter(store) as writer, contextlib.closing(iter(passes)) as batches:
        for batch in batches:
            writer.append(batch[""])
        y, ids = passes.labels()
        writer.finish(y, ids, {**passes.meta(""), "dtype": "float16"})
    return Features.open(store)


def extract_layers(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | Mapping[str, Layer],
    pool: Pool = "auto",
    normalize: bool = False,
    dtype: type[np.floating] = np.float32,
    *,
    preprocessing: str | None = None,
) -> dict[str, Features]:
    """Collect the features of several layers in one pass over the loader; see :func:`extract`.

    Args:
        model: any module.
        loader: as in :func:`extract`.
        layers: names of submodules, or name → layer as in :func:`extract`. Callables run the model once each.
        pool: as in :func:`extract`.
        normalize: as in :func:`extract`.
        dtype: as in :func:`extract`.
        preprocessing: as in :func:`extract`.

    Returns:
        One :class:`Features` per name, in the order of ``layers``.

    Raises:
        ValueError: no layer, or as in :func:`extract`.
    """
    _check_dtype(dtype)
    chosen: dict[str, Layer] = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
    if not chosen:
        raise ValueError("layers must name at least one layer, got none")
    passes = _Passes(model, loader, chosen, pool, normalize, preprocessing)
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    for batch in passes:
        for name, block in batch.items():
            blocks[name].append(block.astype(dtype))
    y, ids = passes.labels()
    return {
        name: Features(np.concatenate(parts), y, ids, {**passes.meta(name), "dtype": np.dtype(dtype).name})
        for name, parts in blocks.items()
    }


def _check_dtype(dtype: type[np.floating]) -> None:
    if not (isinstance(dtype, type) and issubclass(dtype, np.floating)):
        raise TypeError(f"dtype must be a floating NumPy type such as numpy.float32, got {dtype}")


class _Batch(NamedTuple):
    x: Any
    y: Any
    ids: Any


class _Passes:
    """One run over the loader: iterating gives name → features of each batch; labels and ids gather on the way."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        layers: Mapping[str, Layer],
        pool: str,
        normalize: bool,
        preprocessing: str | None,
    ) -> None:
        check_choice("pool", pool, ("cls", "mean", "none", "auto"))
        self.model, self.loader, self.layers, self.pool, self.normalize = model, loader, layers, pool, normalize
        transform = getattr(getattr(loader, "dataset", None), "transform", None)
        if preprocessing is None and transform is not None:
            preprocessing = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))
        self.preprocessing = preprocessing
        self.pooled: dict[str, str] = {}
        self.y: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.rows = 0
        self.batches = 0

    def __iter__(self) -> Generator[dict[str, np.ndarray], None, None]:
        reference = next(self.model.parameters(), next(self.model.buffers(), torch.empty(0)))
        with _eval_mode(self.model):
            for raw in self.loader:
                batch = _as_batch(raw)
                if batch.ids is None and _shuffles(self.loader):
                    raise ValueError(
                        "loader must keep the order of its data set or hand out ids (x, y, ids), got a shuffled loader"
                    )
                with torch.no_grad():
                    outputs = _outputs(self.model, _to(batch.x, reference.device), self.layers)
                features = {name: self._finish(name, output) for name, output in outputs.items()}
                size = len(next(iter(features.values())))
                self._gather(self.y, "y", batch.y, size)
                self._gather(self.ids, "ids", batch.ids, size)
                self.rows += size
                self.batches += 1
                yield features
        if self.batches == 0:
            raise ValueError("loader must give at least one batch, got none")

    def labels(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Labels and ids of all rows."""
        y = np.concatenate(self.y) if self.y else None
        return y, as_labels("ids", np.concatenate(self.ids)) if self.ids else np.arange(self.rows)

    def meta(self, name: str) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "layer": _layer_name(self.layers[name]),
            "pool": self.pooled[name],
            "normalize": self.normalize,
            "preprocessing": self.preprocessing,
        }

    def _gather(self, parts: list[np.ndarray], name: str, values: Any, size: int) -> None:
        if self.batches and (values is not None) != bool(parts):
            raise ValueError(f"{name} must come with every batch or with none, got a change at batch {self.batches}")
        if values is None:
            return
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.shape[:1] != (size,):
            raise ValueError(f"{name} must have one entry per row: expected {size}, got shape {array.shape}")
        parts.append(array)

    def _finish(self, name: str, output: Tensor) -> np.ndarray:
        label = f"features of layer {_layer_name(self.layers[name])!r}"
        wide = output.detach() if output.dtype == torch.float64 else output.detach().float()
        pooled, self.pooled[name] = _pool(label, wide, self.pool)
        check_finite(label, pooled, first_row=self.rows)
        if self.normalize:
            if pooled.dim() != 2:
                raise ValueError(f"normalize=True needs {label} of shape (batch, dim), got {tuple(pooled.shape)}")
            pooled = normalize_rows(label, pooled, first_row=self.rows)
        return pooled.cpu().numpy()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _outputs(model: nn.Module, x: Any, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    captured: dict[str, list[Any]] = {name: [] for name in layers}
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            if not isinstance(layer, str):
                continue
            if layer not in modules:
                near = difflib.get_close_matches(layer, modules, n=3) or list(modules)[1:4]
                raise ValueError(f"layer must name a submodule, got {layer!r}; near it: {', '.join(near)}")
            handle = modules[layer].register_forward_hook(
                lambda _module, _inputs, output, kept=captured[name]: kept.append(output)
            )
            stack.callback(handle.remove)
        output = None
        if any(layer is None or isinstance(layer, str) for layer in layers.values()):
            output = _call(model, x)
    outputs = {}
    for name, layer in layers.items():
        if layer is None:
            value = output
        elif isinstance(layer, str):
            if len(captured[name]) != 1:
                raise ValueError(
                    f"layer must run once per batch, got {layer!r} run {len(captured[name])} times; pass a callable"
                )
            value = captured[name][0]
        else:
            value = layer(model, x)
        if isinstance(value, list | tuple) and len(value) and not callable(layer):
            value = value[0]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"layer {_layer_name(layer)!r} must give a tensor, got {type(value).__name__}; pass a callable"
            )
        outputs[name] = value
    return outputs


def _pool(label: str, features: Tensor, pool: str) -> tuple[Float[Tensor, batch * dims], str]:
    if features.dim() < 2:
        raise ValueError(f"{label} must have shape (batch, ..., dim), got {tuple(features.shape)}")
    if pool == "none" or (features.dim() == 2 and pool != "cls"):
        return features, "none"
    if pool == "cls":
        if features.dim() != 3:
            raise ValueError(f"pool='cls' needs {label} of shape (batch, length, dim), got {tuple(features.shape)}")
        return features[:, 0], "cls"
    return features.mean(dim=1) if features.dim() == 3 else features.flatten(2).mean(dim=2), "mean"


def _as_batch(raw: Any) -> _Batch:
    if isinstance(raw, Tensor):
        return _Batch(raw, None, None)
    if isinstance(raw, Mapping):
        if "x" not in raw or set(raw) - {"x", "y", "ids"}:
            raise TypeError(f"loader must give mappings with 'x' and perhaps 'y' and 'ids', got {sorted(raw)}")
        return _Batch(raw["x"], raw.get("y"), raw.get("ids"))
    if isinstance(raw, list | tuple) and 1 <= len(raw) <= 3:
        return _Batch(*raw, *[None] * (3 - len(raw)))
    raise TypeError(f"loader must give tensors, (x,), (x, y), (x, y, ids) or mappings, got {type(raw).__name__}")


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, list | tuple) else model(x)


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {key: _to(value, device) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_to(value, device) for value in x]
    return x


def _shuffles(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = loader.sampler
    if loader.batch_sampler is not None:
        if type(loader.batch_sampler) is not BatchSampler:
            return True
        sampler = loader.batch_sampler.sampler
    return not isinstance(sampler, SequentialSampler)


def _layer_name(layer: Layer) -> str:
    if layer is None:
        return "output"
    return layer if isinstance(layer, str) else getattr(layer, "__qualname__", type(layer).__name__)
