"""Checks of the batch axis: its length, the order of its entries, and that they keep to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headgate.testing.trees import batch_size, difference, map_tensors, take, tensors
from headgate.testing.trial import Trial

__all__ = ["check_batch_independence", "check_batch_permutation", "check_batch_sizes"]


def check_batch_sizes(trial: Trial) -> None:
    """Works with one entry and with an odd number of them."""
    inputs = trial.draw()
    batch = _batch(trial, inputs, "any_batch_size")
    odd = 3 if batch != 3 else 5
    mend = (
        "take sizes from the input's shape; no squeeze() without an axis; say any_batch_size=False where it must fail"
    )
    for size in (1, odd):
        entries = take(inputs, [entry % batch for entry in range(size)])
        trial.doing = f"forward with {size} batch entries"
        output = trial.run(trial.build().eval(), entries)
        trial.expect_finite(output, f"with {size} batch entries", mend)
        full = dict(tensors(trial.run(trial.build().eval(), inputs), "output"))
        for name, leaf in tensors(output, "output"):
            trial.expect(
                name in full and leaf.dim() == full[name].dim(),
                f"with {size} batch entries {name} has {leaf.dim()} axes, with {batch} it has "
                f"{full[name].dim() if name in full else 'none'}",
                mend,
            )
    trial.doing = f"forward and backward with {odd} batch entries in training mode"
    entries = take(inputs, [entry % batch for entry in range(odd)])
    output, gradients = trial.differentiate(trial.build().train(), entries)
    trial.expect_finite(output, f"with {odd} batch entries in training mode", mend)
    trial.expect_finite_gradients(gradients, f"with {odd} batch entries in training mode", mend)


def check_batch_permutation(trial: Trial) -> None:
    """Permuting the batch permutes the output alike; what has no batch axis stays the same."""
    inputs = trial.draw()
    batch = _batch(trial, inputs, "batch_equivariant")
    if batch < 2:
        trial.fail("the example inputs hold one batch entry", "draw at least two, better three")
    module = trial.build().eval()
    trial.doing = "forward in evaluation mode"
    plain = trial.run(module, inputs)
    shifted, turned = [*range(1, batch), 0], [*reversed(range(batch))]
    for order, name in ((shifted, "shifted"), (turned, "turned round")):
        trial.doing = f"forward with the batch {name}"
        permuted = trial.run(module, take(inputs, order))
        for path, leaf in tensors(permuted, "output"):
            before = dict(tensors(plain, "output")).get(path)
            kept = before is not None and any(
                difference(leaf, candidate, trial.case.tolerance) is None for candidate in _permutations(before, order)
            )
            trial.expect(
                kept,
                f"with the batch {name}, {path} is neither permuted alike nor unchanged",
                "look for state that runs along the batch, or a reshape that mixes the batch axis with another; "
                "say batch_equivariant=False where order counts",
            )


def check_batch_independence(trial: Trial) -> None:
    """In evaluation mode an entry's output depends on that entry's inputs alone."""
    inputs = trial.draw()
    batch = _batch(trial, inputs, "batch_independent")
    if batch < 2:
        trial.fail("the example inputs hold one batch entry", "draw at least two, better three")
    module = trial.build().eval()
    trial.doing = "forward in evaluation mode"
    plain = trial.run(module, inputs)
    mend = (
        "no statistics over the batch in evaluation mode, no broadcast between entries; losses and the like say "
        "batch_independent=False"
    )
    rows = _rows(plain, batch)
    trial.expect(bool(rows), "no output has a batch axis", mend)
    for entry in (0, batch - 1):
        trial.doing = f"forward with entry {entry} changed"
        others = [other for other in range(batch) if other != entry]
        changed = _rows(trial.run(module, _exchange(trial, inputs, entry)), batch)
        for name, leaf in rows.items():
            problem = difference(changed.get(name, leaf[:0])[others], leaf[others], trial.case.tolerance, name)
            trial.expect(problem is None, f"changing entry {entry} changes others: {problem}", mend)
        trial.doing = f"forward with entry {entry} alone"
        alone = _rows(trial.run(module, take(inputs, [entry])), 1) if trial.case.any_batch_size else {}
        for name, leaf in alone.items():
            if name in rows:
                problem = difference(leaf, rows[name][[entry]], trial.case.tolerance, name)
                trial.expect(problem is None, f"entry {entry} alone gives another result: {problem}", mend)


def _batch(trial: Trial, inputs: tuple[Any, ...], flag: str) -> int:
    batch = batch_size(inputs)
    if not batch:
        trial.fail("no input has a batch axis, or it is empty", f"say {flag}=False, or draw inputs with one")
    return batch


def _rows(output: Any, batch: int) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in tensors(output, "output") if leaf.dim() > 0 and leaf.shape[0] == batch}


def _exchange(trial: Trial, inputs: tuple[Any, ...], entry: int) -> tuple[Any, ...]:
    """Another draw's entry in the place of this one; of the same draw, where the other's shapes differ."""
    batch = batch_size(inputs)
    other = dict(tensors(trial.draw(seed=11), "inputs"))
    given = dict(tensors(inputs, "inputs"))
    fits = {name: t.shape for name, t in other.items()} == {name: t.shape for name, t in given.items()}
    if not fits or all(torch.equal(other[name], given[name]) for name in given):
        assert batch is not None
        entries = list(range(batch))
        entries[entry] = (entry + 1) % batch
        exchanged: tuple[Any, ...] = take(inputs, entries)
        return exchanged
    names = iter(given)

    def put(tensor: Tensor) -> Tensor:
        source = other[next(names)]
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            return tensor
        result = tensor.clone()
        result[entry] = source[entry]
        return result

    mixed: tuple[Any, ...] = map_tensors(put, inputs)
    return mixed


def _permutations(before: Tensor, order: Sequence[int]) -> list[Tensor]:
    """What a permuted batch may make of an output: nothing, its rows permuted, blocks of rows, rows and columns."""
    batch, index = len(order), torch.tensor(order)
    candidates = [before]
    if before.dim() > 0 and before.shape[0] % batch == 0 and before.shape[0] > 0:
        blocks = before.unflatten(0, (batch, -1))
        candidates.append(blocks[index].flatten(0, 1))
    if before.dim() > 1 and before.shape[0] == before.shape[1] == batch:
        candidates.append(before[index][:, index])
    return candidates
