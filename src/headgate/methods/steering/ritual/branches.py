"""The same model run beside itself on other inputs, after the same answer, with key-value caches of their own.

Everything that depends on the model's class (where image features go, positions of padded or multimodal prompts, expansion
to beams) is left to the model's own ``generate``: it prepares each branch and hands it to us instead of decoding it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

__all__ = ["Branch", "branches_of"]


class Branch:
    """One or more views that run as one batch of a model from transformers.

    Args:
        model: any model with ``generate`` that keeps a key-value cache.
        inputs: what ``generate`` would get for these views: ``input_ids``, images, masks.
        views: how many views lie in the batch, one after the other.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], views: int) -> None:
        self.model = model
        self.inputs = dict(inputs)
        self.views = views
        self._rows = 0
        self._answer: Int64[Tensor, "rows length"] | None = None
        self._decoder: Any = None
        self._ids: Tensor | None = None
        self._state: dict[str, Any] = {}
        self._outputs: Any = None

    def logits(self, answer: Int64[Tensor, "batch length"]) -> Float[Tensor, "views batch vocabulary"]:
        """Give every view's logits of the token that follows an answer.

        Where the answer is the last one and one more token, row by row or after beams have changed places, only the new
        token is run; else the branch begins anew.

        Args:
            answer: the tokens after the prompt, ``length`` ≥ 0; ``batch`` is a multiple of the batch of the inputs, and
                the rows of one input lie side by side.
        """
        rows = answer.repeat(self.views, 1)
        order = self._order(rows)
        if order is None:
            self._begin(len(rows))
            if rows.shape[1]:
                self._run(rows)
        else:
            self._reorder(order)
            self._run(rows[:, -1:])
        self._answer = rows
        logits: Tensor = self._outputs.logits[:, -1]
        return logits.unflatten(0, (self.views, len(answer)))

    def _order(self, rows: Int64[Tensor, "rows length"]) -> Int64[Tensor, " rows"] | None:
        """For each row, the one before whose answer it goes on from, of the same input; None where one goes on from none."""
        last = self._answer
        if last is None or len(rows) != self._rows or rows.shape[1] != last.shape[1] + 1:
            return None
        same: Bool[Tensor, "rows rows"] = (rows[:, None, :-1] == last[None]).all(dim=-1)
        expand = self._rows // _batch(self.inputs)
        owner = torch.arange(len(rows), device=rows.device) // expand
        same = same & (owner[:, None] == owner[None])
        if not bool(same.any(dim=1).all()):
            return None
        stays = same.diagonal()
        return torch.where(stays, torch.arange(len(rows), device=rows.device), same.int().argmax(dim=1))

    def _reorder(self, order: Int64[Tensor, " rows"]) -> None:
        if bool((order == torch.arange(len(order), device=order.device)).all()):
            return
        cache = self._outputs.cache
        if hasattr(self._decoder, "_reorder_cache"):
            self._outputs.cache = self._decoder._reorder_cache(cache, order)
        else:
            cache.reorder_cache(order)
        assert self._ids is not None
        self._ids = self._ids[order]

    def _begin(self, rows: int) -> None:
        """Let ``generate`` prepare the branch for so many rows, and run the prompt."""
        expand, rest = divmod(rows, _batch(self.inputs))
        if rest or not expand:
            raise ValueError(
                f"views must have a batch that divides the model's, got {_batch(self.inputs) // self.views} for "
                f"{rows // self.views} sequences"
            )
        prepared: list[tuple[Any, Tensor, dict[str, Any]]] = []

        def hand_over(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                arguments.pop(name, None)
            prepared.append((model, input_ids, arguments))
            return input_ids

        with _kept_positions(self.model):
            self.model.generate(  # type: ignore[operator]
                **self.inputs,
                custom_generate=hand_over,
                do_sample=True,
                num_beams=1,
                num_return_sequences=expand,
                max_new_tokens=1,
                use_cache=True,
                cache_implementation="dynamic",
                return_dict_in_generate=False,
            )
            self._decoder, self._ids, self._state = prepared[0]
            inputs = self._decoder.prepare_inputs_for_generation(self._ids, is_first_iteration=True, **self._state)
            self._outputs = self._decoder(**inputs, return_dict=True)
        self._rows = rows

    def _run(self, tokens: Int64[Tensor, "rows new"]) -> None:
        """Run tokens that follow what the cache holds."""
        new = tokens.shape[1]
        decoder = self._decoder
        self._state = decoder._update_model_kwargs_for_generation(self._outputs, self._state, num_new_tokens=new)
        assert self._ids is not None
        self._ids = torch.cat([self._ids, tokens.to(self._ids)], dim=1)
        inputs = decoder.prepare_inputs_for_generation(self._ids, next_sequence_length=new, **self._state)
        self._outputs = decoder(**inputs, return_dict=True)


def branches_of(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> list[tuple[Branch, list[int]]]:
    """Put views of equal prompt lengths into one batch, and give each branch with the places of its views."""
    groups: dict[Any, list[int]] = {}
    for place, view in enumerate(inputs):
        tensors = all(isinstance(value, Tensor) for value in view.values())
        alike = (tuple(sorted(view)), tuple(view["input_ids"].shape)) if tensors else place
        groups.setdefault(alike, []).append(place)
    branches = []
    for places in groups.values():
        views = [inputs[place] for place in places]
        stacked = (
            views[0] if len(views) == 1 else {name: torch.cat([view[name] for view in views]) for name in views[0]}
        )
        branches.append((Branch(model, stacked, len(views)), places))
    return branches


def _batch(inputs: Mapping[str, Any]) -> int:
    return len(inputs["input_ids"])


@contextlib.contextmanager
def _kept_positions(model: nn.Module) -> Iterator[None]:
    """Some models (Qwen2-VL) remember the positions of the last prompt on themselves; the main branch's come back."""
    kept = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas
