r"""Deep Interest Network: a ranking model that pools the user's history anew for every candidate (paper, Section 4).

::

    goods    e = [item ⊕ category ⊕ …]            one table per field, for history and candidate alike
    base     u = Σ_j e_j  or their mean
    DIN      u(v) = Σ_j a(e_j, v) e_j             the local activation unit
    logit    MLP([profile and context, u, v])     then a sigmoid: the probability of a click

The published network for Amazon puts ``u ⊙ v`` beside u and v, batch normalisation on u and on the tower's input, a linear
layer behind u, and a bias per item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.methods.recommend.din.activation_unit import FixedPooling, LocalActivationUnit
from headgate.methods.recommend.din.dice import Activation, activate, make_activation
from headgate.methods.recommend.din.fields import FeatureSpec, read_fields, real_places
from headgate.methods.recommend.din.regularization import check_ids
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive

__all__ = ["DIN"]


class DIN(nn.Module, HubModel):
    """Score candidates for users with histories.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` keep it as safetensors and a JSON of its arguments; for
    that, activations must be given by name.

    Args:
        fields: name → :class:`Field` (or a dict of its arguments), for the candidate and for all that describes user and
            context. A history's fields are not listed: they share those of the candidate.
        history: names of the history's inputs, in the order of ``target``.
        target: names of the candidate's inputs, each in ``fields``; together they make the goods' embedding.
        mlp: widths of the tower's hidden layers.
        activation: of the tower; see :class:`LocalActivationUnit`.
        pooling: ``"attention"`` for the local activation unit; ``"sum"`` or ``"mean"`` for the paper's base model.
        attention: widths of the activation unit's hidden layers.
        attention_activation: of the activation unit; ``None`` takes that of the tower.
        normalize: of the activation unit: ``None`` (raw weights), ``"softmax"`` or ``"scaled_softmax"``.
        interaction: give the tower ``u ⊙ v``, too.
        batch_norm: normalise u and the tower's input over the batch.
        project: put a linear layer behind u.
        item_bias: name of an input of the candidate whose ids get a bias each.
        sparse: gradients of the tables are sparse, for ``torch.optim.SparseAdam``.
        embedding_std: standard deviation of new embeddings, drawn from a normal distribution.
        official_quirks: see :class:`LocalActivationUnit`.

    Raises:
        ValueError: names that do not fit each other, a size that is not positive, or an unknown option.
    """

    def __init__(
        self,
        fields: FeatureSpec,
        history: Sequence[str],
        target: Sequence[str],
        mlp: Sequence[int] = (80, 40),
        activation: Activation = "dice",
        *,
        pooling: Literal["attention", "sum", "mean"] = "attention",
        attention: Sequence[int] = (80, 40),
        attention_activation: Activation | None = None,
        normalize: Literal["softmax", "scaled_softmax"] | None = None,
        interaction: bool = False,
        batch_norm: bool = False,
        project: bool = False,
        item_bias: str | None = None,
        sparse: bool = False,
        embedding_std: float = 0.05,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        self.fields = read_fields(fields)
        self.history, self.target = tuple(history), tuple(target)
        self.others = tuple(name for name in self.fields if name not in self.target)
        self._check_names(item_bias)
        check_positive(embedding_std=embedding_std)
        if not mlp or min(mlp) < 1:
            raise ValueError(f"mlp must hold one positive width at least, got {list(mlp)}")
        if pooling not in ("attention", "sum", "mean"):
            raise ValueError(f"pooling must be 'attention', 'sum' or 'mean', got {pooling!r}")
        self.item_bias = item_bias
        self.interaction = interaction
        self.embedding_std = embedding_std
        self.official_quirks = official_quirks
        self.goods_dim = sum(self.fields[name].dim for name in self.target)
        self.tables = nn.ModuleDict()
        for name, field in self.fields.items():
            if field.vocabulary is not None:
                self.tables[name] = nn.Embedding(field.vocabulary, field.dim, sparse=sparse)
        self.pool: nn.Module
        if pooling == "attention":
            chosen = activation if attention_activation is None else attention_activation
            self.pool = LocalActivationUnit(
                self.goods_dim, attention, chosen, normalize, official_quirks=official_quirks
            )
        else:
            self.pool = FixedPooling(pooling)
        self.interest_norm = _batch_norm(self.goods_dim) if batch_norm else nn.Identity()
        self.interest = nn.Linear(self.goods_dim, self.goods_dim) if project else nn.Identity()
        width = sum(self.fields[name].dim for name in self.others) + (3 if interaction else 2) * self.goods_dim
        self.tower_norm = _batch_norm(width) if batch_norm else nn.Identity()
        self.tower = nn.ModuleList()
        for after in mlp:
            self.tower.extend([nn.Linear(width, after), make_activation(activation, after)])
            width = after
        self.output = nn.Linear(width, 1)
        self.bias: nn.Embedding | None = None
        if item_bias is not None:
            vocabulary = self.fields[item_bias].vocabulary
            assert vocabulary is not None
            self.bias = nn.Embedding(vocabulary, 1, sparse=sparse)
        self.reset_embeddings()
        # JSON knows neither Field nor functions.
        self._remember(fields={name: asdict(field) for name, field in self.fields.items()})
        self._named_activations = not callable(activation) and not callable(attention_activation)

    @torch.no_grad()
    def reset_embeddings(self) -> None:
        """Draw the tables anew, and set the items' biases to 0."""
        for table in self.tables.values():
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=self.embedding_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias.weight)

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch *candidates"]:
        """Compute the logit of a click.

        Args:
            batch: by name,

                - every field: ids int64 ``(batch,)``, or numbers ``(batch, dim)``;
                - every input of the history: ids ``(batch, length)``, or numbers ``(batch, length, dim)``;
                - ``mask``: bool ``(batch, length)``, True for a behaviour. Padding holds any legal id.

                For many candidates of one user, the candidate's inputs may be ``(batch, candidates)`` and
                ``(batch, candidates, dim)``. Other entries are not looked at.

        Returns:
            ``(batch,)`` or ``(batch, candidates)``.

        Raises:
            TypeError: an input of the wrong kind.
            ValueError: an input is missing, has another shape, or holds an id out of range.
        """
        shape = self._check_batch(batch)
        goods = self._embed(self.target, self.target, batch)
        pooled = self._pooled(goods, batch)
        flat = goods.reshape(-1, self.goods_dim)
        interest = self.interest(self.interest_norm(pooled.reshape(-1, self.goods_dim)))
        parts = [interest, flat]
        if self.others:
            others = self._embed(self.others, self.others, batch)
            if len(shape) == 2:
                others = others.unsqueeze(1).expand(*shape, -1).flatten(0, 1)
            parts.insert(0, others)
        if self.interaction:
            parts.append(interest * flat)
        hidden = self.tower_norm(torch.cat(parts, dim=-1))
        for layer, activation in zip(self.tower[::2], self.tower[1::2], strict=True):
            hidden = activate(activation, layer(hidden), None)
        logits = self.output(hidden)
        if self.bias is not None and self.item_bias is not None:
            logits = logits + self.bias(batch[self.item_bias].reshape(-1))
        return logits.reshape(shape)

    def attention_weights(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch *candidates length"]:
        """Compute the weights that the activation unit gives to a history, for looking at.

        Args:
            batch: as in :meth:`forward`.

        Raises:
            TypeError: the model pools without an activation unit; or as in :meth:`forward`.
            ValueError: as in :meth:`forward`.
        """
        if not isinstance(self.pool, LocalActivationUnit):
            raise TypeError("attention_weights needs a model with pooling='attention'")
        self._check_batch(batch)
        goods = self._embed(self.target, self.target, batch)
        _, weights = self.pool(goods, self._embed_history(batch), batch["mask"], return_weights=True)
        return weights

    def table_ids(self, batch: Mapping[str, Tensor]) -> dict[str, Int64[Tensor, " ids"]]:
        """Name of a table → all ids that a batch looks up in it, for :class:`MiniBatchAwareL2`; padding is -1.

        Args:
            batch: as in :meth:`forward`.
        """
        ids = {}
        paired = dict(zip(self.target, self.history, strict=True))
        for name in self.tables:
            parts = [batch[name].flatten()]
            if name in paired:
                parts.append(batch[paired[name]].masked_fill(~batch["mask"], -1).flatten())
            ids[name] = torch.cat(parts).long()
        return ids

    def tower_inputs(self) -> list[tuple[str, int]]:
        """Name and size of each piece of the tower's input, in order; the pooled history has the history's names."""
        sizes = [self.fields[name].dim for name in self.target]
        pieces = [(name, self.fields[name].dim) for name in self.others]
        pieces += [*zip(self.history, sizes, strict=True), *zip(self.target, sizes, strict=True)]
        if self.interaction:
            pieces += [(f"{name} * candidate", size) for name, size in zip(self.history, sizes, strict=True)]
        return pieces

    def _embed(
        self, names: Sequence[str], keys: Sequence[str], batch: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape dim"]:
        """The inputs ``keys``, each by the table of its name, side by side."""
        parts = [
            self.tables[name](batch[key]) if name in self.tables else batch[key]
            for name, key in zip(names, keys, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def _embed_history(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch length dim"]:
        """The behaviours; zero at padding where it need not be computed."""
        mask, place = batch["mask"], self._real_places(batch)
        if place is None:
            return self._embed(self.target, self.history, batch)
        rows = self._embed_real(batch, place)
        return rows.new_zeros(mask.numel(), self.goods_dim).index_copy(0, place, rows).unflatten(0, mask.shape)

    def _embed_real(self, batch: Mapping[str, Tensor], place: Int64[Tensor, " real"]) -> Float[Tensor, "real dim"]:
        """The behaviours that are none of the padding, user by user."""
        real = {key: batch[key].flatten(0, 1).index_select(0, place) for key in self.history}
        return self._embed(self.target, self.history, real)

    def _real_places(self, batch: Mapping[str, Tensor]) -> Int64[Tensor, " real"] | None:
        # As published, padding takes part.
        return None if self.official_quirks else real_places(batch["mask"])

    def _pooled(
        self, goods: Float[Tensor, "batch *candidates dim"], batch: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch *candidates dim"]:
        place = self._real_places(batch)
        if place is not None and isinstance(self.pool, FixedPooling):
            return self.pool.pool_rows(goods, self._embed_real(batch, place), place // batch["mask"].shape[1])
        pooled: Tensor = self.pool(goods, self._embed_history(batch), batch["mask"])
        return pooled

    def _save_pretrained(self, save_directory: Path) -> None:
        if not self._named_activations:
            raise ValueError("a DIN whose activation is a function cannot be saved: give the activation by name")
        super()._save_pretrained(save_directory)

    def _check_names(self, item_bias: str | None) -> None:
        missing = [name for name in self.target if name not in self.fields]
        if missing or not self.target or len(set(self.target)) != len(self.target):
            raise ValueError(f"target must hold different names of fields {list(self.fields)}, got {list(self.target)}")
        if len(self.history) != len(self.target):
            raise ValueError(
                f"history must have one input for each of target {list(self.target)}, got {list(self.history)}"
            )
        names = [*self.fields, *self.history, "mask"]
        if len(set(names)) != len(names):
            raise ValueError(f"fields, history and 'mask' must be different names, got {names}")
        if item_bias is not None and (item_bias not in self.target or self.fields[item_bias].vocabulary is None):
            raise ValueError(f"item_bias must name an input of target with ids, got {item_bias!r}")

    def _check_batch(self, batch: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Check every input, and give the shape of the logits."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must map names to tensors, got {type(batch).__name__}")
        missing = [name for name in (*self.fields, *self.history, "mask") if name not in batch]
        if missing:
            raise ValueError(f"batch must hold {', '.join(map(repr, missing))}, got {', '.join(map(repr, batch))}")
        mask, first = batch["mask"], batch[self.target[0]]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"batch['mask'] must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2:
            raise ValueError(f"batch['mask'] must have shape (batch, length), got {tuple(mask.shape)}")
        if not isinstance(first, Tensor):
            raise TypeError(f"batch[{self.target[0]!r}] must be a tensor, got {type(first).__name__}")
        shape = tuple(first.shape) if self.fields[self.target[0]].vocabulary is not None else tuple(first.shape[:-1])
        if len(shape) not in (1, 2) or shape[0] != mask.shape[0]:
            raise ValueError(
                f"batch[{self.target[0]!r}] must have as many entries as batch['mask'] {tuple(mask.shape)}, one or "
                f"several candidates each, got {tuple(first.shape)}"
            )
        for name in self.target:
            self._check_input(name, name, batch, shape)
        for name, key in zip(self.target, self.history, strict=True):
            self._check_input(name, key, batch, tuple(mask.shape))
        for name in self.others:
            self._check_input(name, name, batch, shape[:1])
        return shape

    def _check_input(self, name: str, key: str, batch: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        field, value, label = self.fields[name], batch[key], f"batch[{key!r}]"
        if not isinstance(value, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")
        expected = shape if field.vocabulary is not None else (*shape, field.dim)
        if tuple(value.shape) != expected:
            raise ValueError(f"{label} must have shape {expected}, got {tuple(value.shape)}")
        if field.vocabulary is not None:
            check_ids(label, value, field.vocabulary, lowest=0)
        else:
            check_floating(label, value, self.output.weight.dtype)


def _batch_norm(width: int) -> nn.BatchNorm1d:
    """With the constants of the published code."""
    return nn.BatchNorm1d(width, eps=1e-3, momentum=0.01)
