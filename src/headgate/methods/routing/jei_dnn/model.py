"""Early exits on any backbone (Regol, Chataoui and Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural
Network: JEI-DNN", ICLR 2024).

A frozen backbone of L blocks gets a head and a gate behind each of its first blocks. :meth:`EarlyExit.forward_all`
computes everything, for training and for judging; :meth:`EarlyExit.infer` stops: inputs that a gate lets go leave the
batch, and the blocks behind it run on those that are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.costs import check_costs
from headgate.methods.routing.jei_dnn.exit_rule import (
    ExitState,
    exit_index,
    exit_probabilities,
    exit_step,
    first_state,
)
from headgate.methods.routing.jei_dnn.heads import ExitHeads, ExitOutputs, Head
from headgate.methods.routing.jei_dnn.taps import PassEnded, Taps, check_names, find_blocks, name_exits
from headgate.methods.routing.jei_dnn.uncertainty import check_finite_logits

__all__ = ["EarlyExit", "ExitPrediction", "Pool"]

Pool: TypeAlias = Literal["auto", "token", "mean"] | Callable[[Tensor], Tensor]


class ExitPrediction(NamedTuple):
    """The answers of a network that stops early.

    Attributes:
        logits: ``(batch, classes)`` of the exit where each input left.
        exit_index: ``(batch,)`` int64; 0 is the first exit, G the final one.
        cost: ``(batch,)`` share of the full cost in (0, 1].
    """

    logits: Float[Tensor, "batch classes"]
    exit_index: Int[Tensor, " batch"]
    cost: Float[Tensor, " batch"]


class EarlyExit(nn.Module):
    """A frozen backbone with heads and gates behind its blocks.

    The backbone is kept as it is: forward hooks on its blocks read the features. Its parameters are frozen, its batch
    norms stay in evaluation mode; dropout and stochastic depth follow :meth:`train`. Entries of a batch must not depend on
    each other, and the first argument of every block, and its output, must have the batch on the first axis.

    Args:
        backbone: any classifier: of timm, of transformers, or your own. It returns logits, or an object with ``logits``.
        num_classes: C; default ``backbone.num_classes``, or its ``config.num_labels``.
        exits: positions of the blocks behind which exits stand, counted from 0 and increasing, or the names of submodules
            in the order in which they run; default: every block but the last.
        blocks: name of the list of blocks that positions count; default: the longest one of the backbone.
        dim: D, size of the pooled features; default ``backbone.num_features``, or its ``config.hidden_size``.
        norm: name of the backbone's submodule that is applied to what was pooled, such as its final layer norm.
        pool: how a block's output becomes ``(batch, D)``: ``"token"`` takes the first token of ``(batch, length, D)``,
            ``"mean"`` the mean over tokens, or over the places of ``(batch, D, height, width)``; ``"auto"`` takes the first
            token of three axes, the mean of four, and leaves two alone; or a function.
        gate: as in :class:`ExitHeads`.
        head: as in :class:`ExitHeads`.
        costs: ``(G + 1,)`` cost of each exit; default: its share of the blocks, equal
            steps for named submodules. See :func:`profile_costs`.
        batched: names of further arguments of the blocks that have the batch on their first axis, such as masks; they lose
            the same rows when inputs leave.

    Raises:
        TypeError: ``backbone`` is no module, or ``exits`` are neither positions nor names.
        ValueError: an argument is out of range, or cannot be read from the backbone.
    """

    costs: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int | None = None,
        exits: Sequence[int | str] | None = None,
        *,
        blocks: str | None = None,
        dim: int | None = None,
        norm: str | None = None,
        pool: Pool = "auto",
        gate: nn.Module | None = None,
        head: Head = nn.Linear,
        costs: Sequence[float] | Tensor | None = None,
        batched: Sequence[str] = ("attention_mask",),
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a module, got {type(backbone).__name__}")
        if not callable(pool) and pool not in _POOLS:
            raise ValueError(f"pool must be one of {', '.join(map(repr, _POOLS))} or a function, got {pool!r}")
        chosen, shares = _exits(backbone, exits, blocks)
        if norm is not None and norm not in dict(backbone.named_modules()):
            raise ValueError(f"norm must name a submodule of the backbone, got {norm!r}")
        self.backbone = backbone.requires_grad_(False)
        self.exits = ExitHeads(
            _stated("dim", dim, backbone, ("num_features", "hidden_size")),
            _stated("num_classes", num_classes, backbone, ("num_classes", "num_labels")),
            len(chosen),
            gate=gate,
            head=head,
        )
        self.exit_names = tuple(chosen)
        self.norm_name = norm
        self.pool = pool
        values = check_costs([*shares, 1.0] if costs is None else costs, len(chosen) + 1)
        self.register_buffer("costs", torch.tensor(values))
        self.taps = Taps(backbone, chosen, batched)

    @property
    def num_gates(self) -> int:
        """G, the number of early exits."""
        return self.exits.num_gates

    def forward(self, *args: Any, **kwargs: Any) -> ExitOutputs:
        """The same as :meth:`forward_all`."""
        return self.forward_all(*args, **kwargs)

    def forward_all(self, *args: Any, **kwargs: Any) -> ExitOutputs:
        """Compute every exit of every input.

        Args:
            *args: of the backbone.
            **kwargs: of the backbone.

        Raises:
            ValueError: the blocks ran in another order than ``exits`` names, or a logit is not finite.
        """
        features, final_logits = self.features(*args, **kwargs)
        return self.exits(features, final_logits)

    def features(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch gates dim"], Float[Tensor, "batch classes"]]:
        """What the frozen backbone gives to the exits: worth keeping, when heads and gates are trained for many epochs.

        Args:
            *args: of the backbone.
            **kwargs: of the backbone.

        Returns:
            Pooled features ``(batch, G, dim)`` and the final logits ``(batch, C)``: the inputs of ``self.exits``.

        Raises:
            ValueError: the blocks ran in another order than ``exits`` names.
        """
        kept: list[Tensor] = []

        def keep(number: int, hidden: Tensor) -> None:
            kept.append(self.pooled(hidden))

        self.taps.start(keep)
        try:
            output = self.backbone(*args, **kwargs)
        finally:
            self.taps.stop()
        if len(kept) != self.num_gates:
            raise ValueError(f"exits must all run in every pass, got {len(kept)} of {list(self.exit_names)}")
        return torch.stack(kept, dim=1), _logits(output)

    @torch.no_grad()
    def infer(self, *args: Any, compact: bool = True, **kwargs: Any) -> ExitPrediction:
        """Answer each input at the first exit whose gate lets it go, in evaluation mode or not as the module stands.

        Args:
            *args: of the backbone.
            compact: take inputs out of the batch when they leave, and stop when none is left. Without it everything is
                computed for all of them: the same answers at full cost (and in one piece, for ``torch.compile``).
            **kwargs: of the backbone.

        Raises:
            ValueError: a logit is not finite, the blocks ran in another order than ``exits`` names, or an argument of a
                block kept rows that have left: name it in ``batched``.
        """
        return (self._stopping if compact else self._choosing)(*args, **kwargs)

    def set_costs(self, costs: Sequence[float] | Tensor) -> None:
        """Put new costs ``(G + 1,)`` in place, such as measured ones.

        Raises:
            ValueError: another length, or costs that are not positive, finite and rising.
        """
        values = check_costs(costs, self.num_gates + 1)
        self.costs = torch.tensor(values, dtype=self.costs.dtype, device=self.costs.device)

    def release(self) -> nn.Module:
        """Take the hooks off the backbone and hand it back; this module cannot be used afterwards."""
        self.taps.remove()
        return self.backbone

    def train(self, mode: bool = True) -> EarlyExit:
        """Set the mode of all parts; batch norms of the frozen backbone stay in evaluation mode."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def pooled(self, hidden: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch dim"]:
        """What a head reads of a block's output, z_l = norm(x_l)[:, 0] for a class token."""
        z = self.pool(hidden) if callable(self.pool) else _POOLS[self.pool](hidden)
        if z.dim() != 2 or z.shape[1] != self.exits.dim:
            raise ValueError(
                f"pool must give (batch, {self.exits.dim}), got {tuple(z.shape)} of a block's {tuple(hidden.shape)}"
            )
        return z if self.norm_name is None else self.backbone.get_submodule(self.norm_name)(z)

    def _choosing(self, *args: Any, **kwargs: Any) -> ExitPrediction:
        outputs = self.forward_all(*args, **kwargs)
        check_finite_logits("logits", outputs.logits)
        # From the gates in float32, as in a pass that stops, also where the network computes in bfloat16.
        wide = torch.promote_types(outputs.gate_logits.dtype, torch.float32)
        taken = exit_index(exit_probabilities(outputs.gate_logits.to(wide)))
        rows = torch.arange(len(taken), device=taken.device)
        return ExitPrediction(outputs.logits[taken, rows], taken, self.costs[taken])

    def _stopping(self, *args: Any, **kwargs: Any) -> ExitPrediction:
        leaving = _Leaving(self)
        output = None
        with self.taps.open(leaving), contextlib.suppress(PassEnded):
            output = self.backbone(*args, **kwargs)
        if output is not None:
            leaving.finish(_logits(output))
        logits, taken = leaving.answers()
        return ExitPrediction(logits, taken, self.costs[taken])


class _Leaving:
    """The visitor of a pass from which inputs leave: keeps who is still there, and the answers of those who left."""

    def __init__(self, model: EarlyExit) -> None:
        self.model = model
        self.rows: Tensor | None = None
        self.state: ExitState | None = None
        self.left: list[tuple[Tensor, Tensor, int]] = []

    def __call__(self, number: int, hidden: Tensor) -> Tensor | None:
        rows = torch.arange(hidden.shape[0], device=hidden.device) if self.rows is None else self.rows
        self._expect(hidden.shape[0], len(rows), f"behind exit {number}")
        logits, gate_logit = self.model.exits.step(number, self.model.pooled(hidden))
        check_finite_logits("logits", logits)
        _, conditional, state = exit_step(gate_logit, self.state or first_state(gate_logit))
        leaves = conditional >= 0.5
        stays = (~leaves).nonzero().squeeze(1)
        if len(stays) == len(rows):
            self.rows, self.state = rows, state
            return None
        self.left.append((rows[leaves], logits[leaves], number))
        if len(stays) == 0:
            raise PassEnded
        self.rows = self.model.taps.rows = rows[stays]
        self.state = ExitState(*(part[stays] for part in state))
        return hidden[stays]

    def finish(self, final_logits: Tensor) -> None:
        """Take the final exit's answers for those who stayed."""
        if self.rows is None:
            raise ValueError(f"exits must run in every pass, got none of {list(self.model.exit_names)}")
        self._expect(final_logits.shape[0], len(self.rows), "at the final exit")
        check_finite_logits("logits", final_logits)
        self.left.append((self.rows, final_logits, self.model.num_gates))

    def answers(self) -> tuple[Tensor, Tensor]:
        """Logits and exits in the order of the batch."""
        order = torch.cat([rows for rows, _, _ in self.left]).argsort()
        logits = torch.cat([logits.to(self.left[0][1].dtype) for _, logits, _ in self.left])
        taken = torch.cat([torch.full_like(rows, number) for rows, _, number in self.left])
        return logits[order], taken[order]

    def _expect(self, found: int, expected: int, where: str) -> None:
        if found != expected:
            raise ValueError(
                f"batched must name every argument of the blocks that carries the batch, got {found} rows {where} where "
                f"{expected} inputs are left"
            )


def _exits(backbone: nn.Module, exits: Sequence[int | str] | None, blocks: str | None) -> tuple[list[str], list[float]]:
    """Names of the tapped submodules, and each one's share of the cost where nothing better is known."""
    names = [exit for exit in exits or () if isinstance(exit, str)]
    if names and len(names) == len(exits or ()):
        if blocks is not None:
            raise ValueError(f"blocks is for exits by position, got blocks={blocks!r} and exits={names}")
        return check_names(backbone, names), [(place + 1) / (len(names) + 1) for place in range(len(names))]
    found = find_blocks(backbone, blocks)
    chosen = name_exits(cast(Sequence[int] | None, exits), found)
    return chosen, [(found.index(name) + 1) / len(found) for name in chosen]


def _auto(hidden: Tensor) -> Tensor:
    return {3: _first_token, 4: _mean}.get(hidden.dim(), _as_is)(hidden)


def _first_token(hidden: Tensor) -> Tensor:
    return hidden[:, 0]


def _mean(hidden: Tensor) -> Tensor:
    return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.flatten(2).mean(dim=2)


def _as_is(hidden: Tensor) -> Tensor:
    return hidden


_POOLS = {"auto": _auto, "token": _first_token, "mean": _mean}


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"backbone must return logits or an object with logits, got {type(output).__name__}")
    return found


def _stated(argument: str, value: int | None, backbone: nn.Module, attributes: tuple[str, str]) -> int:
    if value is None:
        own, configured = attributes
        value = getattr(backbone, own, getattr(getattr(backbone, "config", None), configured, None))
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(
            f"{argument} must be given for a {type(backbone).__name__}, which has no {attributes[0]}; got {value!r}"
        )
    return value
