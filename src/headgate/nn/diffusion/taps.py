"""Features of any module while it runs: hooks that are gone afterwards, and a way to stop at the last wanted layer.

Layers are named by module paths (``"up_blocks.1.resnets.0"``), by patterns (``"blocks.*"``), or by block numbers from 1:

- a U-Net's input blocks, each down-sampling one included, its middle block, its output blocks, where what up-samples
  belongs to the block before it (:class:`~headgate.nn.diffusion.ADMUNet`, and the U-Nets of diffusers, which then number
  as ADM does);
- a transformer's blocks.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["LayerName", "Pooling", "Position", "numbered_blocks", "pool_features", "tap", "tokens_to_maps"]

LayerName: TypeAlias = str | int
Pooling: TypeAlias = Literal["mean", "cls"] | int | None
Position: TypeAlias = Literal["after", "before_upsample"]


class _StopForward(Exception):
    """Raised inside a forward pass once every wanted layer has run."""


@contextlib.contextmanager
def tap(
    model: nn.Module,
    layers: Sequence[LayerName],
    pool: Pooling = None,
    detach: bool = True,
    stop_early: bool = False,
    position: Position = "after",
    full_precision: bool = False,
) -> Iterator[dict[LayerName, Tensor]]:
    """Collect outputs of layers while the model runs inside the block.

    Args:
        model: any module.
        layers: names, patterns or block numbers; a pattern gives one entry per module that it matches.
        pool: see :func:`pool_features`.
        detach: keep no graph.
        stop_early: end the pass when the last wanted layer has run, and with it the block; nothing behind the call of the
            model inside the block is then executed.
        position: ``"before_upsample"`` reads a U-Net's numbered block before what up-samples inside it.
        full_precision: return float32 from maps of lower precision.

    Yields:
        Layer → features, filled while the model runs, in the order in which the layers ran; a layer that runs again
        replaces what it gave before. Of an output that is a tuple the first tensor is taken.

    Raises:
        TypeError: a layer gave no tensor.
        ValueError: no layer, an unknown one, or pooling that does not fit.
    """
    chosen = _resolve(model, layers, position)
    features: dict[LayerName, Tensor] = {}
    missing = set(chosen)
    handles: list[RemovableHandle] = []

    def keeper(name: LayerName) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            value = pool_features(_first_tensor(name, output), pool)
            value = value.detach() if detach else value
            if full_precision:
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            features.pop(name, None)
            features[name] = value
            missing.discard(name)
            if stop_early and not missing:
                raise _StopForward

        return keep

    try:
        for name, module in chosen.items():
            handles.append(module.register_forward_hook(keeper(name)))
        with contextlib.suppress(_StopForward):
            yield features
    finally:
        for handle in handles:
            handle.remove()


def pool_features(features: Tensor, pool: Pooling) -> Tensor:
    """Pool tokens ``(B, N, D)`` or maps ``(B, C, h, w)``.

    Args:
        features: what a layer gave.
        pool: ``None`` keeps it; ``"mean"`` gives ``(B, D)``; ``"cls"`` the first token; an integer p the adaptive average
            of p × p cells of a map, ``(B, C, p, p)``, or of tokens that form a square, ``(B, D, p, p)``. Pooling never
            enlarges a map.

    Raises:
        ValueError: pooling that the features do not allow.
    """
    if pool is None:
        return features
    if features.dim() not in (3, 4):
        raise ValueError(f"pool needs tokens (B, N, D) or maps (B, C, h, w), got shape {tuple(features.shape)}")
    if pool == "mean":
        return features.mean(dim=1) if features.dim() == 3 else features.mean(dim=(2, 3))
    if pool == "cls":
        if features.dim() != 3:
            raise ValueError(f"pool='cls' needs tokens (B, N, D), got shape {tuple(features.shape)}")
        return features[:, 0]
    if not isinstance(pool, int) or isinstance(pool, bool) or pool < 1:
        raise ValueError(f"pool must be None, 'mean', 'cls' or a positive integer, got {pool!r}")
    maps = tokens_to_maps(features) if features.dim() == 3 else features
    if pool > min(maps.shape[2:]):
        raise ValueError(f"pool must not exceed the map's side, got pool={pool} for maps of {tuple(maps.shape[2:])}")
    return nn.functional.adaptive_avg_pool2d(maps, pool)


def tokens_to_maps(tokens: Tensor) -> Tensor:
    """``(B, n², D)`` in raster order → ``(B, D, n, n)``.

    Raises:
        ValueError: the tokens form no square.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"tokens must form a square to be pooled in cells, got {tokens.shape[1]} of them")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def numbered_blocks(model: nn.Module, position: Position = "after") -> list[tuple[str, nn.Module]]:
    """The modules whose outputs are those of blocks 1, 2, … of a denoiser, with their paths.

    Args:
        model: with ``input_blocks``, ``middle_block`` and ``output_blocks``; or with ``down_blocks``, ``mid_block`` and
            ``up_blocks``, as in diffusers; or with ``blocks`` or ``transformer_blocks``.
        position: where a block that up-samples is read.

    Raises:
        ValueError: ``model`` has none of these, or an unknown ``position``.
    """
    if position not in ("after", "before_upsample"):
        raise ValueError(f"position must be 'after' or 'before_upsample', got {position!r}")
    if hasattr(model, "input_blocks") and hasattr(model, "output_blocks"):
        paths = _adm_paths(model, position)
    elif hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        paths = _diffusers_paths(model, position)
    else:
        for name in ("blocks", "transformer_blocks"):
            if isinstance(getattr(model, name, None), nn.ModuleList):
                paths = [f"{name}.{index}" for index in range(len(getattr(model, name)))]
                break
        else:
            raise ValueError(f"{type(model).__name__} has no numbered blocks; name its layers by their module paths")
    return [(path, model.get_submodule(path)) for path in paths]


def _adm_paths(model: Any, position: Position) -> list[str]:
    paths = [f"input_blocks.{index}" for index in range(len(model.input_blocks))] + ["middle_block"]
    for index, block in enumerate(model.output_blocks):
        path = f"output_blocks.{index}"
        enlarges = len(block) > 1 and (getattr(block[-1], "resample", None) == "up" or hasattr(block[-1], "conv"))
        paths.append(f"{path}.{len(block) - 2}" if position == "before_upsample" and enlarges else path)
    return paths


def _diffusers_paths(model: Any, position: Position) -> list[str]:
    paths = ["conv_in"]
    for index, block in enumerate(model.down_blocks):
        paths += _stage_paths(f"down_blocks.{index}", block)
        if getattr(block, "downsamplers", None):
            paths.append(f"down_blocks.{index}.downsamplers.0")
    paths += ["mid_block"] if model.mid_block is not None else []
    for index, block in enumerate(model.up_blocks):
        stage = _stage_paths(f"up_blocks.{index}", block)
        if getattr(block, "upsamplers", None) and position == "after":
            stage[-1] = f"up_blocks.{index}.upsamplers.0"
        paths += stage
    return paths


def _stage_paths(path: str, block: Any) -> list[str]:
    attentions = getattr(block, "attentions", None)
    part = "attentions" if attentions is not None and len(attentions) == len(block.resnets) else "resnets"
    return [f"{path}.{part}.{index}" for index in range(len(block.resnets))]


def _resolve(model: nn.Module, layers: Sequence[LayerName], position: Position) -> dict[LayerName, nn.Module]:
    if isinstance(layers, str | int) or not layers:
        raise ValueError(f"layers must be a list of at least one name or block number, got {layers!r}")
    modules = dict(model.named_modules())
    chosen: dict[LayerName, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, int) and not isinstance(layer, bool):
            blocks = numbered_blocks(model, position)
            if not 1 <= layer <= len(blocks):
                raise ValueError(f"block numbers lie in 1..{len(blocks)}, got {layer}")
            chosen[layer] = blocks[layer - 1][1]
        elif isinstance(layer, str):
            found = [layer] if layer in modules else fnmatch.filter(modules, layer)
            if not found:
                raise ValueError(f"{type(model).__name__} has no layer {layer!r}; print(model) shows their paths")
            chosen.update((name, modules[name]) for name in found)
        else:
            raise ValueError(f"layers must be names or block numbers, got {layer!r}")
    return chosen


def _first_tensor(name: LayerName, output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    sample = getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    raise TypeError(f"layer {name!r} must give a tensor or a tuple that begins with one, got {type(output).__name__}")
