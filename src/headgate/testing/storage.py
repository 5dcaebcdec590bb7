"""Checks of what a module holds: state dict, copies, the meta device, tensors that nobody registered."""

from __future__ import annotations

import copy
import functools
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headgate.testing.trees import difference, tensors
from headgate.testing.trial import Trial, seeded

__all__ = ["check_deepcopy", "check_hidden_tensors", "check_meta_device", "check_state_dict"]

_OWN_FIELDS = frozenset(vars(nn.Module()))
_DEPTH = 8
_LARGE = 64
"""From this many values on, a real tensor of a parameter's shape under the meta device counts as allocated."""


def check_state_dict(trial: Trial) -> None:
    """The state dict goes through safetensors and back: same names, same ties, same output; nothing is pickled."""
    inputs = trial.draw()
    module, other = trial.build(seed=1), trial.build(seed=2)
    trial.doing = "forward in evaluation mode"
    expected = trial.run(module.eval(), inputs)
    state: dict[str, Any] = module.state_dict()
    loose = [name for name, value in state.items() if not isinstance(value, Tensor)]
    mend = "hand out tensors only in state_dict (no get_extra_state with Python objects)"
    trial.expect(not loose, f"the state dict holds what is no tensor: {', '.join(loose)}", mend)
    trial.doing = "torch.load(weights_only=True) of the saved state dict"
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    trial.expect_same(torch.load(file, weights_only=True), dict(state), 0.0, "torch.load(weights_only=True)", mend)
    trial.doing = "saving the state dict to safetensors"
    groups = _shared(state)
    kept = {names[0]: state[names[0]].contiguous() for names in groups}
    loaded = safetensors.torch.load(safetensors.torch.save(kept))
    restored = {name: loaded[names[0]] for names in groups for name in names}
    trial.doing = "load_state_dict(strict=True) into a second module"
    other.load_state_dict(restored, strict=True)
    problem = difference(dict(sorted(other.state_dict().items())), dict(sorted(state.items())), 0.0, "state")
    mend = "register every tensor as parameter or buffer, under one name in every instance"
    trial.expect(problem is None, f"after load_state_dict: {problem}", mend)
    ties = [names for names in groups if len(names) > 1]
    broken = [" = ".join(names) for names in ties if names not in _shared(other.state_dict())]
    mend = "tie by assigning the same Parameter to both places in __init__"
    trial.expect(not broken, f"tied tensors come apart after load_state_dict: {'; '.join(broken)}", mend)
    trial.doing = "forward of the second module"
    missing = [name for name, tensor in _unsaved(module) if not _equal(tensor, dict(other.named_buffers()).get(name))]
    hint = f" (buffers that are not saved differ: {', '.join(missing)})" if missing else ""
    mend = "what differs between two instances must be in the state dict: a parameter or a persistent buffer"
    problem = difference(trial.run(other.eval(), inputs), expected, 0.0)
    trial.expect(problem is None, f"the loaded module gives another result: {problem}{hint}", mend)


def check_deepcopy(trial: Trial) -> None:
    """copy.deepcopy, after a training step too, gives an equal module that shares nothing with the first."""
    inputs = trial.draw()
    module = trial.build()
    trial.doing = "forward and backward before copying"
    trial.differentiate(module.train(), inputs)
    trial.doing = "copy.deepcopy after a training step"
    twin = copy.deepcopy(module)
    trial.doing = "forward of the first module and of its copy"
    expected = trial.run(module.eval(), inputs)
    mend = "keep no tensor that hangs in an autograd graph, no generator or lock that cannot be copied"
    trial.expect_same(trial.run(twin.eval(), inputs), expected, 0.0, "the copy", mend)
    ties, twin_ties = _shared(_registered(module)), _shared(_registered(twin))
    trial.expect(ties == twin_ties, f"ties of the copy are {twin_ties} in place of {ties}", mend)
    own = {_place(tensor): name for name, tensor in tensors_of(module) if tensor.numel()}
    common = sorted({own[_place(t)] for _, t in tensors_of(twin) if t.numel() and _place(t) in own})
    mend = "no tensor in a global or class attribute, no __deepcopy__ that hands on the same tensor"
    trial.expect(not common, f"the copy shares memory with the first: {', '.join(common)}", mend)
    trial.doing = "forward of the first module after its copy was changed"
    with torch.no_grad():
        for _, tensor in _registered(twin).items():
            if tensor.is_floating_point():
                tensor.add_(1.0)
    trial.expect_same(trial.run(module, inputs), expected, 0.0, "after its copy was changed, the first", mend)


def check_hidden_tensors(trial: Trial) -> None:
    """Every tensor the module holds moves with ``module.to``; none hides in an attribute, list, closure or cache."""
    inputs = trial.draw()
    mend = "register_buffer (persistent=False for what can be computed anew), nn.ParameterList, nn.ModuleList"
    module = trial.build().eval()
    trial.doing = "forward in evaluation mode"
    trial.run(module, inputs)
    trial.doing = "module.to(torch.float64)"
    module.to(torch.float64)
    left = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors_of(module)
        if tensor.is_floating_point() and tensor.dtype != torch.float64
    ]
    trial.expect(not left, f"module.to(torch.float64) leaves behind {', '.join(left)}", mend)
    if torch.float64 in trial.case.dtypes:
        trial.doing = "forward after module.to(torch.float64)"
        double = trial.cast(inputs, torch.float64)
        expected = trial.run(trial.build().to(torch.float64).eval(), double)
        trial.expect_same(trial.run(module, double), expected, 1e-9, "after use in float32, float64", mend)
    trial.doing = 'module.to("meta")'
    module.to("meta")
    left = [f"{name} ({tensor.device})" for name, tensor in tensors_of(module) if not tensor.is_meta]
    trial.expect(not left, f'module.to("meta") leaves behind {", ".join(left)}', mend)


def check_meta_device(trial: Trial) -> None:
    """Can be built on the meta device without memory, with the same names and shapes, then filled from a state dict.

    The filling is ``to_empty`` and ``load_state_dict``; between them, as under FSDP, ``reset_parameters`` is called on
    the submodules that own buffers which are not saved.
    """
    inputs = trial.draw()
    real = trial.build(seed=1)
    shapes = {tuple(tensor.shape) for tensor in _registered(real).values() if tensor.numel() >= _LARGE}
    trial.doing = "building under torch.device('meta')"
    with _Allocations(shapes) as seen, torch.device("meta"), seeded(1):
        module = trial.case.factory()
    mend = "create tensors by torch's own functions without a device, or with the device argument handed on"
    left = [name for name, tensor in tensors_of(module) if not tensor.is_meta]
    trial.expect(not left, f"under the meta device these are real: {', '.join(left)}", mend)
    trial.expect(not seen.found, f"under the meta device real memory is allocated: {', '.join(seen.found)}", mend)
    trial.expect_same(_describe(module), _describe(real), 0.0, "built on the meta device", mend)
    trial.doing = "to_empty(device='cpu'), reset_parameters and load_state_dict"
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in _registered(module).values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    with seeded(1):
        for owner in module.modules():
            if owner._non_persistent_buffers_set and callable(reset := getattr(owner, "reset_parameters", None)):
                reset()
    module.load_state_dict(real.state_dict())
    trial.doing = "forward after to_empty and load_state_dict"
    unsaved = dict(_unsaved(module))
    empty = [name for name, tensor in _unsaved(real) if not _equal(unsaved.get(name), tensor)]
    mend = (
        "make the buffer persistent, compute it in forward, or fill it in the reset_parameters of the module that owns "
        "it; let no constant depend on values seen in __init__"
    )
    trial.expect(not empty, f"not restored after to_empty and load_state_dict: {', '.join(empty)}", mend)
    expected = trial.run(real.eval(), inputs)
    actual = trial.run(module.eval(), inputs)
    trial.expect_same(actual, expected, 0.0, "filled after to_empty, the module", mend)


class _Allocations(TorchDispatchMode):
    """Notes every real tensor of one of the given shapes that an operation returns."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for _, tensor in tensors(result, "result"):
            if not tensor.is_meta and tuple(tensor.shape) in self.shapes:
                self.found.append(f"{tuple(tensor.shape)} by {func}")
        return result


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be reached from the module: registered, or in any attribute, container or closure."""
    seen: set[int] = set()
    registered = set(map(id, module.modules()))
    for name, tensor in _registered(module).items():
        seen.add(id(tensor))
        yield name, tensor
    for prefix, part in module.named_modules():
        for key, value in vars(part).items():
            if key not in _OWN_FIELDS:
                yield from _reach(value, f"{prefix}.{key}" if prefix else key, seen, registered, _DEPTH)


def _reach(value: Any, path: str, seen: set[int], registered: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or id(value) in registered or depth == 0:
        return
    if isinstance(value, Tensor):
        seen.add(id(value))
        yield path, value
        return
    if isinstance(value, str | bytes | int | float | complex | type | None):
        return
    seen.add(id(value))
    for key, child in _inside(value):
        yield from _reach(child, f"{path}.{key}", seen, registered, depth - 1)


def _inside(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, nn.Module):
        return list(_registered(value).items())
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return list(enumerate(value))
    if isinstance(value, functools.partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if callable(value) and getattr(value, "__closure__", None):
        names = value.__code__.co_freevars
        return [(n, c.cell_contents) for n, c in zip(names, value.__closure__, strict=True) if _is_filled(c)]
    if callable(value) and hasattr(value, "__self__"):
        return [("__self__", value.__self__)]
    home = type(value).__module__.partition(".")[0]
    if home in {"torch", "numpy", "builtins", "types"} or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).items())


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _registered(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _unsaved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = set(module.state_dict())
    return ((name, tensor) for name, tensor in module.named_buffers() if name not in saved)


def _shared(state: Mapping[str, Any]) -> list[list[str]]:
    """The names in groups: those of one group are the same piece of memory, seen alike."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        alike = (_place(tensor), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        groups[alike].append(name)
    return list(groups.values())


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and difference(left, right, 0.0) is None


def _describe(module: nn.Module) -> dict[str, Any]:
    trainable = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return {
        name: (*tensor.shape, str(tensor.dtype), "trainable" if name in trainable else "fixed")
        for name, tensor in _registered(module).items()
    }
