"""Train heads and gates of a frozen network in turn (paper, Section 4.3 and Appendix; official code).

Warm-up: all heads on ``Σ_l (G + 1 − l) CE_l``, l from 0, until a head's validation accuracy has not risen for some epochs
(its best weights come back, and it is frozen) or the epochs are over; then all are released. Then epochs in which gates and
heads take turns every ``switch_every`` batches; every epoch begins with the gates. The learning rate stays as it is during
the warm-up and falls along a cosine, epoch by epoch, afterwards. After every epoch the validation inputs tell how rare it is
that an exit is the best, for the weights of the gate loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.costs import check_costs
from headgate.methods.routing.jei_dnn.exit_rule import exit_index, optimal_exits
from headgate.methods.routing.jei_dnn.heads import ExitHeads, ExitOutputs
from headgate.methods.routing.jei_dnn.losses import (
    CountRule,
    GateLoss,
    GateObjective,
    HeadLoss,
    HeadWeighting,
    exit_cross_entropy,
    exit_objective,
    positive_weights,
    warmup_weights,
)
from headgate.methods.routing.jei_dnn.model import EarlyExit
from headgate.train import epoch_batches, fit, make_optimizer, warmup_cosine
from headgate.validate import check_positive

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["JEIHistory", "JEITrainer", "Phase", "TrainingBatches", "training_phase"]

Phase: TypeAlias = Literal["gate", "head"]
Selection: TypeAlias = Literal["accuracy", "last"]
Parts: TypeAlias = Sequence[Tensor]


class TrainingBatches(Protocol):
    """Batches by step, as :func:`headgate.train.epoch_batches` gives them; the last tensor of each is the target."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""

    def __call__(self, step: int) -> Parts:
        """Give the batch of one step, counted over all epochs."""


@dataclass
class JEIHistory:
    """What a training went through.

    Attributes:
        warmup: per warm-up epoch, validation accuracy of every early exit, ``exit_0`` ….
        epochs: per epoch of alternation, what the gated prediction reached on the validation inputs: ``accuracy``,
            ``cost``, and ``exit_0`` …, the share of inputs that left at each exit.
        best: the epoch of alternation, counted from 0, whose weights the model has now.
        pos_weight: weights w_l of the gate loss after the last epoch.
    """

    warmup: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = -1
    pos_weight: list[float] = field(default_factory=list)


def training_phase(batch: int, switch_every: int) -> Phase:
    """Which of the two is trained on a batch.

    Args:
        batch: its position in the epoch, from 0.
        switch_every: batches after which the other takes its turn.

    Raises:
        ValueError: ``switch_every`` is not positive.
    """
    check_positive(switch_every=switch_every)
    return "gate" if (batch // switch_every) % 2 == 0 else "head"


class JEITrainer:
    """The training procedure of JEI-DNN.

    For a loop of your own, take :func:`training_phase`, :class:`GateLoss`, :class:`HeadLoss` and
    :func:`positive_weights`; :meth:`loss` puts them together.

    Args:
        model: :class:`EarlyExit`, or its :class:`ExitHeads` for training on kept features (:func:`collect_features`, :func:`keep_features`),
            which takes a thousandth of the time but no dropout or stochastic depth.
        lam: λ ≥ 0, what a full computation is worth in nats; larger exits earlier.
        costs: ``(G + 1,)`` cost of each exit; default those of an :class:`EarlyExit`.
        epochs: epochs of alternation.
        warmup_epochs: most epochs of warm-up; 0 for heads that are trained already.
        warmup_patience: epochs without a better validation accuracy after which a head is frozen.
        batch_size: inputs per update, where tensors are given.
        switch_every: batches after which gates and heads change over.
        head_weighting: as in :class:`HeadLoss`; ``"uniform"`` is what the official code computes.
        gate_objective: as in :class:`GateLoss`.
        max_pos_weight: greatest weight of a gate's positives.
        pos_weight_rule: as in :func:`positive_weights`.
        learning_rate: of SGD.
        final_learning_rate: at the end of the cosine.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        selection: which weights stay: ``"accuracy"``, those of the epoch with the best gated validation accuracy, or
            ``"last"``.
        seed: of the order of batches and of dropout.

    Raises:
        ValueError: a number is out of range, or a name unknown.
    """

    def __init__(
        self,
        model: EarlyExit | ExitHeads,
        lam: float,
        *,
        costs: Sequence[float] | Tensor | None = None,
        epochs: int = 12,
        warmup_epochs: int = 6,
        warmup_patience: int = 2,
        batch_size: int = 64,
        switch_every: int = 200,
        head_weighting: HeadWeighting = "exit_prob",
        gate_objective: GateObjective = "ce",
        max_pos_weight: float = 5.0,
        pos_weight_rule: CountRule = "optimal",
        learning_rate: float = 0.01,
        final_learning_rate: float = 2e-4,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        selection: Selection = "accuracy",
        seed: int = 322,
    ) -> None:
        check_positive(
            epochs=epochs,
            warmup_patience=warmup_patience,
            batch_size=batch_size,
            switch_every=switch_every,
            max_pos_weight=max_pos_weight,
            learning_rate=learning_rate,
        )
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, got {warmup_epochs}")
        if not 0 <= final_learning_rate <= learning_rate:
            raise ValueError(
                f"final_learning_rate must lie in [0, learning_rate], got {final_learning_rate} and {learning_rate}"
            )
        if selection not in get_args(Selection):
            raise ValueError(f"selection must be one of {', '.join(map(repr, get_args(Selection)))}, got {selection!r}")
        if costs is None:
            if not isinstance(model, EarlyExit):
                raise ValueError("costs must be given for ExitHeads, which do not know what their backbone costs")
            costs = model.costs
        self.model = model
        self.exits = model.exits if isinstance(model, EarlyExit) else model
        self.costs = check_costs(costs, self.exits.num_gates + 1)
        self.gate_loss = GateLoss(list(self.costs), lam, objective=gate_objective)
        self.head_loss = HeadLoss(head_weighting)
        self.pos_weight = torch.ones(self.exits.num_gates)
        self.epochs, self.warmup_epochs, self.warmup_patience = epochs, warmup_epochs, warmup_patience
        self.batch_size, self.switch_every, self.seed = batch_size, switch_every, seed
        self.max_pos_weight, self.pos_weight_rule = max_pos_weight, pos_weight_rule
        self.learning_rate, self.final_learning_rate = learning_rate, final_learning_rate
        self.selection: Selection = selection
        self.optimizer = make_optimizer(
            self.exits, "sgd", learning_rate, weight_decay, momentum, decay_norms_and_biases=True
        )

    def fit(self, train: Parts | TrainingBatches, val: Parts, *, accelerator: Accelerator | None = None) -> JEIHistory:
        """Warm the heads up, then train gates and heads in turn, in place.

        Args:
            train: tensors, all but the last of which the model is called with, and the last of which is the target
                ``(N,)``; or batches of such by step.
            val: tensors like that; never trained on.
            accelerator: for several processes; make it with
                ``DistributedDataParallelKwargs(find_unused_parameters=True)``, since only one of the two is trained at a
                time.

        Returns:
            What happened epoch by epoch.

        Raises:
            ValueError: no input to validate with, or no batch.
            DivergedError: a loss was not finite.
        """
        history = JEIHistory()
        if self.warmup_epochs:
            self.warm_up(train, val, history, accelerator=accelerator)
        self.alternate(train, val, history, accelerator=accelerator)
        return history

    def warm_up(
        self,
        train: Parts | TrainingBatches,
        val: Parts,
        history: JEIHistory | None = None,
        *,
        accelerator: Accelerator | None = None,
    ) -> JEIHistory:
        """Train the heads alone, each until it gets no better.

        Args:
            train: as in :meth:`fit`.
            val: as there.
            history: where to write what happens; default a new one.
            accelerator: as there.
        """
        history = JEIHistory() if history is None else history
        batches = self._batches(train)
        patience = _Patience(self.exits, self.warmup_patience)
        weights = warmup_weights(self.exits.num_gates)

        def loss(model: nn.Module, batch: Parts) -> Tensor:
            *inputs, target = batch
            ce = exit_cross_entropy(model(*inputs).logits, target)
            return sum((weight * ce[:, exit].mean() for exit, weight in enumerate(weights)), ce.new_zeros(()))

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            logits, _ = self._outputs(val)
            target = val[-1].to(logits.device)
            found = [float((answer == target).double().mean()) for answer in logits[:-1].argmax(dim=2)]
            metrics = {f"exit_{exit}": accuracy for exit, accuracy in enumerate(found)}
            if step:
                history.warmup.append(metrics)
                patience.see(found)
            return metrics

        try:
            fit(
                self.model,
                batches,
                loss,
                steps=self.warmup_epochs * batches.steps_per_epoch,
                optimizer=self.optimizer,
                evaluate=evaluate,
                evaluate_every=batches.steps_per_epoch,
                stop=lambda _: patience.is_over,
                accelerator=accelerator,
                seed=self.seed,
            )
        finally:
            patience.release()
        return history

    def alternate(
        self,
        train: Parts | TrainingBatches,
        val: Parts,
        history: JEIHistory | None = None,
        *,
        accelerator: Accelerator | None = None,
    ) -> JEIHistory:
        """Train gates and heads in turn.

        Args:
            train: as in :meth:`fit`.
            val: as there.
            history: where to write what happens; default a new one.
            accelerator: as there.
        """
        history = JEIHistory() if history is None else history
        batches = self._batches(train)
        steps = batches.steps_per_epoch
        best: dict[str, Tensor] = {}

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            metrics, optimal = self._validate(val)
            if step == 0:
                return metrics
            history.epochs.append(metrics)
            self.pos_weight = positive_weights(
                optimal, self.exits.num_gates, max_weight=self.max_pos_weight, rule=self.pos_weight_rule
            )
            leads = history.best < 0 or metrics["accuracy"] > history.epochs[history.best]["accuracy"]
            if self.selection == "last" or leads:
                history.best = len(history.epochs) - 1
                best.update({name: tensor.clone() for name, tensor in self.exits.state_dict().items()})
            return metrics

        fit(
            self.model,
            lambda step: (training_phase(step % steps, self.switch_every), *batches(step)),
            lambda model, batch: self.loss(model, batch[0], batch[1:]),
            steps=self.epochs * steps,
            optimizer=self.optimizer,
            schedule=warmup_cosine(
                self.epochs * steps, floor=self.final_learning_rate / self.learning_rate, every=steps
            ),
            evaluate=evaluate,
            evaluate_every=steps,
            accelerator=accelerator,
            seed=self.seed,
        )
        self.exits.load_state_dict(best)
        history.pos_weight = self.pos_weight.tolist()
        return history

    def loss(self, model: nn.Module, phase: Phase, batch: Parts) -> Tensor:
        """The loss of one batch in one phase; the part whose turn it is not gets no gradient.

        Args:
            model: the model, or what wraps it.
            phase: from :func:`training_phase`.
            batch: as in :meth:`fit`.
        """
        *inputs, target = batch
        outputs = cast(ExitOutputs, model(*inputs))
        if phase == "gate":
            weight = self.pos_weight.to(outputs.gate_logits.device)
            criterion = self.gate_loss.to(outputs.gate_logits.device)
            return criterion(outputs.gate_logits, outputs.logits, target, weight)
        return self.head_loss(outputs.logits, outputs.exit_prob, target)

    def _batches(self, train: Parts | TrainingBatches) -> TrainingBatches:
        if callable(train):
            return train
        return epoch_batches(list(train), min(self.batch_size, len(train[-1])), self.seed)

    @torch.no_grad()
    def _outputs(self, val: Parts) -> tuple[Float[Tensor, "exits n classes"], Float[Tensor, "n exits"]]:
        """Logits and exit probabilities of the validation inputs."""
        if len(val[-1]) == 0:
            raise ValueError("val must hold at least one input, got none")
        device = next(self.exits.parameters()).device
        parts: list[ExitOutputs] = []
        for chunk in zip(*(tensor.split(4 * self.batch_size) for tensor in val[:-1]), strict=True):
            parts.append(self.model(*(tensor.to(device) for tensor in chunk)))
        return torch.cat([part.logits for part in parts], dim=1), torch.cat([part.exit_prob for part in parts])

    def _validate(self, val: Parts) -> tuple[dict[str, float], Int[Tensor, " n"]]:
        """What the gated prediction reaches, and the optimal exits."""
        logits, exit_prob = self._outputs(val)
        target = val[-1].to(logits.device)
        costs = torch.tensor(self.costs, device=logits.device)
        taken = exit_index(exit_prob)
        answers = logits[taken, torch.arange(len(taken), device=taken.device)].argmax(dim=1)
        shares = torch.bincount(taken, minlength=len(costs)).double() / len(taken)
        metrics = {
            "accuracy": float((answers == target).double().mean()),
            "cost": float(costs[taken].double().mean()),
            **{f"exit_{exit}": share for exit, share in enumerate(shares.tolist())},
        }
        objective = exit_objective(logits, target, self.gate_loss.objective)
        return metrics, optimal_exits(objective, costs, self.gate_loss.lam)


class _Patience:
    """Freezes heads, each with its best weights, when they have not become better for some epochs."""

    def __init__(self, exits: ExitHeads, epochs: int) -> None:
        self.heads = list(exits.heads)
        self.epochs = epochs
        self.best = [-1.0] * len(self.heads)
        self.waited = [0] * len(self.heads)
        self.weights: list[dict[str, Tensor]] = [{} for _ in self.heads]
        self.frozen: dict[int, Callable[[], None]] = {}

    @property
    def is_over(self) -> bool:
        return len(self.frozen) == len(self.heads)

    def see(self, accuracies: Sequence[float]) -> None:
        for exit, (head, accuracy) in enumerate(zip(self.heads, accuracies, strict=True)):
            if exit in self.frozen:
                continue
            if accuracy > self.best[exit]:
                self.best[exit], self.waited[exit] = accuracy, 0
                self.weights[exit] = {name: tensor.clone() for name, tensor in head.state_dict().items()}
                continue
            self.waited[exit] += 1
            if self.waited[exit] >= self.epochs:
                head.load_state_dict(self.weights[exit])
                self.frozen[exit] = _freeze(head)

    def release(self) -> None:
        """Let the frozen heads be trained again."""
        for thaw in self.frozen.values():
            thaw()


def _freeze(head: nn.Module) -> Callable[[], None]:
    """Freeze the trainable parameters of a head, and give what releases just those."""
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)

    def thaw() -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)

    return thaw
