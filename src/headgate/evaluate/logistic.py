"""L2-regularised logistic regression, through scikit-learn or, for large data, through L-BFGS in torch.

Both minimise ``C Σ_i CE(W x_i + b, y_i) + ½‖W‖²`` (the bias is free). Two classes share one weight vector, as in
scikit-learn: the logits are (0, w·x + b).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from headgate.evaluate.probe_data import Scaler

__all__ = ["LogisticModel", "fit_logistic", "fit_logistic_torch"]


class LogisticModel(NamedTuple):
    """A fitted model.

    Attributes:
        weights: ``(K, d)``.
        bias: ``(K,)``.
        classes: ``(K,)`` labels, rising.
        converged: whether the solver ended by itself.
    """

    weights: Float[np.ndarray, "classes dim"]
    bias: Float[np.ndarray, " classes"]
    classes: Int[np.ndarray, " classes"]
    converged: bool

    def decide(self, X: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n classes"]:
        """Return the logits of scaled features."""
        return X @ self.weights.T + self.bias


def fit_logistic(
    X: Float[np.ndarray, "n dim"], y: Int[np.ndarray, " n"], C: float, *, max_iter: int = 1000, tol: float = 1e-6
) -> LogisticModel:
    """Fit by scikit-learn's ``LogisticRegression`` (lbfgs, multinomial).

    Args:
        X: ``(N, d)`` scaled features.
        y: ``(N,)`` labels of at least two classes.
        C: inverse strength of the regularisation.
        max_iter: iterations after which the solver gives up.
        tol: of the gradient.
    """
    model = LogisticRegression(C=C, max_iter=max_iter, tol=tol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    converged = bool(np.max(model.n_iter_) < max_iter)
    weights, bias = model.coef_, model.intercept_
    if len(weights) == 1:
        weights, bias = np.vstack([np.zeros_like(weights), weights]), np.append(0.0, bias)
    return LogisticModel(weights, bias, model.classes_, converged)


def fit_logistic_torch(
    X: Shaped[np.ndarray, "n dim"],
    y: Int[np.ndarray, " n"],
    rows: Int[np.ndarray, " m"],
    scaler: Scaler,
    C: float,
    *,
    max_iter: int = 1000,
    tol: float = 1e-6,
    chunk: int = 16384,
    device: str | torch.device = "cpu",
) -> LogisticModel:
    """Fit by L-BFGS in torch over ``X[rows]``, read and scaled block by block; ``X`` may be a memory map.

    Args:
        X: ``(N, d)`` features as they are.
        y: ``(N,)`` labels.
        rows: the training rows, of at least two classes.
        scaler: fitted on them.
        C: inverse strength of the regularisation.
        max_iter: iterations after which the solver gives up.
        tol: greatest entry of the gradient of the objective, divided by ``C · len(rows)``, at the end.
        chunk: rows per block.
        device: where the products are computed.
    """
    rows = np.sort(rows)
    classes, targets = np.unique(y[rows], return_inverse=True)
    outputs = 1 if len(classes) == 2 else len(classes)
    parameters = torch.zeros(outputs, X.shape[1] + 1, dtype=torch.float64, device=device, requires_grad=True)
    penalty = 1 / (C * len(rows))
    # The objective is divided by C N, which moves no minimum and keeps the step sizes of L-BFGS in scale.
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iter,
        max_eval=max_iter * 2,
        tolerance_grad=tol,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * penalty * parameters[:, :-1].square().sum()
        total.backward()
        for start in range(0, len(rows), chunk):
            block = torch.from_numpy(scaler(X[rows[start : start + chunk]])).to(device)
            wanted = torch.from_numpy(targets[start : start + chunk]).to(device)
            loss = torch.nn.functional.cross_entropy(_logits(block, parameters), wanted, reduction="sum") / len(rows)
            loss.backward()
            total = total + loss.detach()
        return total.detach()

    optimizer.step(closure)
    gradient = parameters.grad
    converged = gradient is not None and bool(gradient.abs().max() <= tol)
    fitted = parameters.detach().cpu().numpy()
    if outputs == 1:
        fitted = np.vstack([np.zeros_like(fitted), fitted])
    return LogisticModel(fitted[:, :-1], fitted[:, -1], classes, converged)


def _logits(block: Float[Tensor, "b dim"], parameters: Float[Tensor, "k dim1"]) -> Float[Tensor, "b classes"]:
    logits = block @ parameters[:, :-1].T + parameters[:, -1]
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
