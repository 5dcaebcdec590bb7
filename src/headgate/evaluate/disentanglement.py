"""Does each latent coordinate track one factor of variation? InfoMEC, DCI and MIG.

- InfoM, InfoC, InfoE (Hsu et al. 2023, arXiv 2305.18378): modularity, compactness and explicitness from the normalised
  mutual information ``NMI_ij = I(s_i; z_j) / H(s_i)`` of sources and latents, and from a logistic regression.
- DCI (Eastwood and Williams 2018): disentanglement and completeness of an importance matrix, and informativeness.
- MIG (Chen et al. 2018, arXiv 1802.04942): the gap between the two latents that know most about a source.

Other estimators give other rankings of methods, so they are fixed: discrete latents have the plug-in mutual
information, continuous ones the k-nearest-neighbour estimate (Ross 2014) with 10 neighbours in InfoMEC and the plug-in
one of 20 equally wide bins in MIG; importances come from a forest of 100 trees.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import digamma

from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_features,
    as_scores,
    as_seed,
    check_choice,
    check_same_length,
)
from headgate.evaluate.undefined import undefined

__all__ = [
    "BINS",
    "DCI",
    "NEIGHBOURS",
    "TREES",
    "InfoMEC",
    "dci",
    "importance_scores",
    "infomec",
    "mig",
    "mutual_information",
]

BINS = 20
NEIGHBOURS = 10
TREES = 100

Estimator = Literal["plugin", "knn", "histogram"]


@dataclass(frozen=True)
class InfoMEC:
    """The result of :func:`infomec`.

    Attributes:
        infom: modularity, each latent informs about one source; 1 is best, 0 is uniform.
        infoe: explicitness, a linear classifier reads the sources off the latents; 1 is best, 0 is chance.
        infoc: compactness, one latent informs about each source; 1 is best, 0 is uniform.
        nmi: ``(n_s, n_z)`` ``I(s_i; z_j) / H(s_i)`` of all latents, before pruning.
        active: ``(n_z,)`` which latents were kept.
    """

    infom: float
    infoe: float
    infoc: float
    nmi: Float[np.ndarray, "source latent"]
    active: Bool[np.ndarray, " latent"]


@dataclass(frozen=True)
class DCI:
    """The result of :func:`dci`.

    Attributes:
        disentanglement: each latent is important for one source; in [0, 1].
        completeness: one latent is important for each source; in [0, 1].
        informativeness: mean accuracy of the forests on held-out samples.
        importance: ``(n_s, n_z)``; every row sums to 1, or to 0 if no latent was of use.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Float[np.ndarray, "source latent"]


def infomec(
    sources: Int[Array, "n source"],
    latents: Float[Array, "n latent"],
    discrete: bool,
    *,
    zero: ZeroPolicy = "error",
    seed: int = 0,
) -> InfoMEC:
    """InfoM, InfoE and InfoC of a representation against known sources.

    Args:
        sources: ``(n, n_s)`` values of at least two sources, relabelled to 0..K-1 each; 10,000 samples in the paper.
        latents: ``(n, n_z)`` latents; for ``discrete`` ones the indices or the values of the codes (values that differ
            by less than 1e-6 of the largest in the column are one code).
        discrete: whether the latents are codes.
        zero: what a kept latent that informs about no source at all leads to, as its modularity is 0/0, and what fewer
            than two kept latents lead to: ``"error"``, or ``"ignore"``, which prunes the latent, and gives nan with a
            warning for InfoM and InfoC where fewer than two are left.
        seed: of the 1e-10-sized noise with which the k-nearest-neighbour estimate breaks ties.

    Returns:
        The scores. Latents are kept if their range is above 0 (discrete), or above 1/20 of the largest (continuous). A
        source that no latent informs about counts 0 in InfoC.

    Raises:
        TypeError: not arrays of real numbers, or integer latents with ``discrete=False``.
        ValueError: NaN or infinity, different n, fewer than two sources, a constant source, a source of non-integers
            with more than n/10 values, discrete latents with more than n/2 values, or, with ``zero="error"``, fewer
            than two latents left or one that informs about no source.
    """
    check_choice("zero", zero, ("error", "ignore"))
    factors = _sources(sources, at_least=2)
    raw = _latents(latents, len(factors), discrete)
    if discrete:
        values = _codes(raw)
        extent = np.ptp(values, axis=0).astype(np.float64)
        active = extent > 0
    else:
        values = _standardised(raw)
        extent = np.ptp(raw, axis=0)
        active = extent > extent.max() / 20
    information = _information(factors, values, "plugin" if discrete else "knn", seed)
    nmi = information / _entropies(factors)[:, None]
    silent = active & (nmi.sum(axis=0) == 0)
    if silent.any() and zero == "error":
        raise ValueError(
            f"latents must inform about a source, got no information in column {int(silent.argmax())} "
            f"({int(silent.sum())} such columns; or pass zero='ignore' to prune them)"
        )
    active = active & ~silent
    kept = int(active.sum())
    if kept < 2 and zero == "error":
        raise ValueError(f"latents must have at least 2 columns left after pruning, got {kept} of {len(active)}")
    infoe = _explicitness(factors, values, discrete)
    if kept < 2:
        nothing = undefined("the modularity and compactness of infomec", f"{kept} of {len(active)} latents are left")
        return InfoMEC(nothing, infoe, nothing, nmi, active)
    shares = nmi[:, active]
    infom = _above_uniform(shares.max(axis=0) / shares.sum(axis=0), len(shares))
    infoc = _above_uniform(_quotient(shares.max(axis=1), shares.sum(axis=1), 1 / kept), kept)
    return InfoMEC(infom, infoe, infoc, nmi, active)


def dci(
    sources: Int[Array, "n source"],
    latents: Float[Array, "n latent"],
    *,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> DCI:
    """Disentanglement, completeness and informativeness with random forests.

    Per source a forest of 100 trees, every split choosing among all latents, learns the source from the latents; the
    importance of a latent is its share of the decrease in Gini impurity.

    Args:
        sources: ``(n, n_s)`` values of at least two sources, relabelled to 0..K-1 each.
        latents: ``(n, n_z)`` at least two latents, continuous or codes.
        test_fraction: share of samples held out for the informativeness, in (0, 1).
        seed: of the split and of the forests.

    Returns:
        The scores; disentanglement is nan, with a warning, if no latent was of use for any source.

    Raises:
        TypeError: not arrays of real numbers.
        ValueError: NaN or infinity, different n, fewer than two sources or latents, a source that is constant or of
            too many values as in :func:`infomec`, or ``test_fraction`` that leaves a side without samples.
    """
    from sklearn.ensemble import RandomForestClassifier

    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie in (0, 1), got test_fraction={test_fraction}")
    factors = _sources(sources, at_least=2)
    values = as_features("latents", latents, dtype=np.float64)
    n = check_same_length(sources=factors, latents=values)
    if values.shape[1] < 2:
        raise ValueError(f"latents must have at least 2 columns, got shape {values.shape}")
    order = np.random.default_rng(as_seed("seed", seed)).permutation(n)
    held_out = round(test_fraction * n)
    if not 0 < held_out < n:
        raise ValueError(f"test_fraction={test_fraction} leaves no samples to fit or to test on, got n={n}")
    test, train = order[:held_out], order[held_out:]
    importance, accuracy = [], []
    for labels in factors.T:
        forest = RandomForestClassifier(TREES, max_features=None, random_state=seed)
        forest.fit(values[train], labels[train])
        importance.append(forest.feature_importances_)
        accuracy.append((forest.predict(values[test]) == labels[test]).mean())
    matrix = np.stack(importance)
    disentanglement, completeness = importance_scores(matrix)
    return DCI(disentanglement, completeness, float(np.mean(accuracy)), matrix)


def importance_scores(importance: Float[Array, "source latent"]) -> tuple[float, float]:
    """Disentanglement and completeness of a matrix of importances (Eastwood and Williams 2018, section 3).

    ``D = Σ_j ρ_j (1 - H_{n_s}(P_·j))`` with ``P_ij`` the importance of latent j for source i over all of latent j's,
    ``ρ_j`` latent j's share of all importance, and the entropy to base n_s; ``C = mean_i (1 - H_{n_z}(Q_i·))`` with
    ``Q_ij`` the same over all of source i's.

    Args:
        importance: ``(n_s, n_z)`` not negative, at least 2 × 2.

    Returns:
        ``(D, C)``, both in [0, 1]. A latent of no importance does not count in D, a source that no latent serves counts
        0 in C; D is nan, with a warning, if all importances are 0.

    Raises:
        TypeError: no array of real numbers.
        ValueError: NaN or infinity, negative values, or fewer than 2 sources or latents.
    """
    matrix = as_scores("importance", importance, shape=(None, None), axes="source, latent")
    if min(matrix.shape) < 2 or matrix.min() < 0:
        raise ValueError(
            f"importance must be at least 2 × 2 and not negative, got shape {matrix.shape} and minimum {matrix.min():g}"
        )
    of_latent, of_source = matrix.sum(axis=0), matrix.sum(axis=1)
    whole = float(matrix.sum())
    if whole == 0:
        return undefined("the disentanglement of DCI", "no latent is of importance for any source"), 0.0
    focus = 1 - _shannon(_quotient(matrix, of_latent[None, :], 0.0), axis=0) / np.log(len(matrix))
    unity = 1 - _shannon(_quotient(matrix, of_source[:, None], 0.0), axis=1) / np.log(matrix.shape[1])
    unity[of_source == 0] = 0.0
    return float(of_latent @ focus / whole), float(unity.mean())


def mig(sources: Int[Array, "n source"], latents: Float[Array, "n latent"], discrete: bool = False) -> float:
    """Mutual information gap: ``mean_i (I(s_i; z_first) - I(s_i; z_second)) / H(s_i)``.

    Args:
        sources: ``(n, n_s)`` source values, relabelled to 0..K-1 each.
        latents: ``(n, n_z)`` at least two latents.
        discrete: whether the latents are codes; continuous ones are cut into 20 equally wide bins.

    Returns:
        In [0, 1]; 1 if every source is known to one latent, in full, and to no other.

    Raises:
        TypeError: not arrays of real numbers, or integer latents with ``discrete=False``.
        ValueError: NaN or infinity, different n, fewer than two latents, or a source or code as in :func:`infomec`.
    """
    factors = _sources(sources, at_least=1)
    raw = _latents(latents, len(factors), discrete)
    if raw.shape[1] < 2:
        raise ValueError(f"latents must have at least 2 columns, got shape {raw.shape}")
    values, estimator = (_codes(raw), "plugin") if discrete else (raw, "histogram")
    ordered = np.sort(_information(factors, values, estimator, seed=0), axis=1)
    return float(((ordered[:, -1] - ordered[:, -2]) / _entropies(factors)).mean())


def mutual_information(
    sources: Int[Array, "n source"],
    latents: Float[Array, "n latent"],
    estimator: Estimator,
    *,
    seed: int = 0,
) -> Float[np.ndarray, "source latent"]:
    """Mutual information of every source with every latent, in nats.

    Args:
        sources: ``(n, n_s)`` source values, relabelled to 0..K-1 each.
        latents: ``(n, n_z)`` latents.
        estimator: ``"plugin"`` for codes; for continuous latents ``"knn"`` (10 neighbours within the class, as
            scikit-learn's ``mutual_info_classif`` on standardised latents; clipped at 0) or ``"histogram"`` (plug-in of
            20 equally wide bins over the range).
        seed: of the noise with which ``"knn"`` breaks ties.

    Returns:
        ``(n_s, n_z)``, at least 0.

    Raises:
        TypeError: not arrays of real numbers, or integer latents with an estimator for continuous ones.
        ValueError: NaN or infinity, different n, an unknown estimator, or a source or code as in :func:`infomec`.
    """
    check_choice("estimator", estimator, ("plugin", "knn", "histogram"))
    factors = _sources(sources, at_least=1)
    raw = _latents(latents, len(factors), discrete=estimator == "plugin")
    values = {"plugin": _codes, "knn": _standardised, "histogram": lambda rows: rows}[estimator](raw)
    return _information(factors, values, estimator, seed)


def _sources(sources: Array, at_least: int) -> Int[np.ndarray, "n source"]:
    """Sources as 0..K-1 per column; refuses those whose values are no classes."""
    raw = as_features("sources", sources, dtype=np.float64)
    n, count = raw.shape
    if count < at_least:
        raise ValueError(f"sources must have at least {at_least} columns, got shape {raw.shape}")
    columns = []
    for i, column in enumerate(raw.T):
        values, labels = np.unique(column, return_inverse=True)
        if len(values) < 2:
            raise ValueError(f"sources must vary, got a constant in column {i}")
        if len(values) > n / 10 and not (values == np.rint(values)).all():
            raise ValueError(
                f"sources must be classes, got {len(values)} values that are no integers among {n} samples in column {i}"
            )
        columns.append(labels)
    return np.stack(columns, axis=1)


def _latents(latents: Array, length: int, discrete: bool) -> Float[np.ndarray, "n latent"]:
    rows = as_features("latents", latents, dtype=np.float64)
    if len(rows) != length:
        raise ValueError(f"sources and latents must have the same length, got {length} and {len(rows)}")
    is_float = latents.dtype.kind == "f" if isinstance(latents, np.ndarray) else latents.is_floating_point()
    if not discrete and not is_float:
        raise TypeError(
            f"latents must be floating point where they are continuous, got {latents.dtype}: are they codes?"
        )
    return rows


def _codes(rows: Float[np.ndarray, "n latent"]) -> Int[np.ndarray, "n latent"]:
    """Codes as 0..K-1 per column; non-integers that differ from the next lower value by rounding are the same code."""
    codes = np.empty(rows.shape, dtype=np.int64)
    for j, column in enumerate(rows.T):
        values, inverse = np.unique(column, return_inverse=True)
        noise = 0.0 if (values == np.rint(values)).all() else 1e-6 * np.abs(values).max()
        distinct = np.cumsum(np.diff(values, prepend=values[0]) > noise)
        if distinct[-1] + 1 > len(rows) / 2:
            raise ValueError(
                f"latents must be codes with discrete=True, got {distinct[-1] + 1} values among {len(rows)} samples in "
                f"column {j}"
            )
        codes[:, j] = distinct[inverse]
    return codes


def _standardised(rows: Float[np.ndarray, "n latent"]) -> Float[np.ndarray, "n latent"]:
    deviations = rows - rows.mean(axis=0)
    std = deviations.std(axis=0)
    constant = std <= 1e-14 * np.abs(rows).max(axis=0)
    return np.where(constant, 0.0, deviations / np.where(constant, 1.0, std))


def _entropies(factors: Int[np.ndarray, "n source"]) -> Float[np.ndarray, " source"]:
    return np.array([_shannon(np.bincount(labels) / len(labels), axis=0) for labels in factors.T])


def _information(
    factors: Int[np.ndarray, "n source"], values: np.ndarray, estimator: str, seed: int
) -> Float[np.ndarray, "source latent"]:
    """``I(s_i; z_j)`` for prepared latents: codes, standardised or raw columns."""
    generator = np.random.default_rng(as_seed("seed", seed))
    result = np.empty((factors.shape[1], values.shape[1]))
    for j, column in enumerate(values.T):
        if estimator == "histogram":
            column = _binned(column)
        if estimator == "knn":
            # scikit-learn's remedy against ties, which the estimator does not allow for
            column = column + 1e-10 * max(1.0, np.abs(column).mean()) * generator.standard_normal(len(column))
            result[:, j] = [_knn_information(labels, column) for labels in factors.T]
        else:
            result[:, j] = [_plugin_information(labels, column) for labels in factors.T]
    return result


def _binned(column: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number of the bin out of 20 equally wide ones over the range; bins are closed below, the last one on both sides."""
    low, high = column.min(), column.max()
    if low == high:
        return np.zeros(len(column), dtype=np.int64)
    edges = np.linspace(low, high, BINS + 1)
    return np.clip(np.searchsorted(edges, column, side="right") - 1, 0, BINS - 1)


def _plugin_information(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    width = int(b.max()) + 1
    joint = np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).reshape(-1, width) / len(a)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    seen = joint > 0
    value = float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())
    return value if value > 1e-15 else 0.0


def _knn_information(labels: Int[np.ndarray, " n"], column: Float[np.ndarray, " n"]) -> float:
    """Ross (2014), eq. 1: ``ψ(N) + <ψ(k)> - <ψ(N_class)> - <ψ(m)>``, at least 0, of one continuous column.

    The radius of a point reaches just short of its k-th neighbour of the same class; m counts all points within it,
    itself included. Points alone in their class are left out. In one dimension the k-th neighbour of a sorted point is
    the far end of the best of k + 1 windows, so no tree is needed.
    """
    sizes = np.bincount(labels)
    usable = sizes[labels] > 1
    labels, column = labels[usable], column[usable]
    radius, neighbours = np.empty(len(column)), np.empty(len(column), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(column[members], kind="stable")]
        k = min(NEIGHBOURS, len(members) - 1)
        radius[members] = _kth_distance(column[members], k)
        neighbours[members] = k
    counts = _within(column, np.nextafter(radius, 0))
    value = digamma(len(column)) + digamma(neighbours).mean() - digamma(sizes[labels]).mean() - digamma(counts).mean()
    return max(0.0, float(value))


def _kth_distance(x: Float[np.ndarray, " m"], k: int) -> Float[np.ndarray, " m"]:
    """Distance of each sorted value to its k-th nearest other one."""
    position = np.arange(len(x))
    best = np.full(len(x), np.inf)
    for below in range(k + 1):
        low, high = position - below, position - below + k
        inside = (low >= 0) & (high < len(x))
        reach = np.maximum(x - x[low.clip(min=0)], x[high.clip(max=len(x) - 1)] - x)
        best = np.where(inside, np.minimum(best, reach), best)
    return best


def _within(column: Float[np.ndarray, " n"], radius: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many values lie within the radius of each value, itself included."""
    x = np.sort(column)
    low = np.searchsorted(x, column - radius, side="left")
    high = np.searchsorted(x, column + radius, side="right")
    # The sum may round across a value at the very edge; the difference decides.
    while (out := (low < len(x)) & (column - x[low.clip(max=len(x) - 1)] > radius)).any():
        low = low + out
    while (out := (low > 0) & (column - x[low - 1] <= radius)).any():
        low = low - out
    while (out := (high > 0) & (x[high - 1] - column > radius)).any():
        high = high - out
    while (out := (high < len(x)) & (x[high.clip(max=len(x) - 1)] - column <= radius)).any():
        high = high + out
    return high - low


def _explicitness(factors: Int[np.ndarray, "n source"], values: np.ndarray, discrete: bool) -> float:
    """``mean_i (H0_i - Hc_i) / H0_i``; with balanced class weights the null model's log-loss is ``log K_i``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    inputs = values
    if discrete:
        inputs = np.concatenate([np.eye(int(column.max()) + 1)[column] for column in values.T], axis=1)
    scores = []
    for labels in factors.T:
        model = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-4, max_iter=100)
        with warnings.catch_warnings():
            # The definition stops after 100 iterations, converged or not.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs, labels)
        null = np.log(labels.max() + 1)
        scores.append((null - log_loss(labels, model.predict_proba(inputs))) / null)
    return float(np.mean(scores))


def _above_uniform(shares: Float[np.ndarray, " n"], count: int) -> float:
    """Mean share rescaled from [1/count, 1] to [0, 1]."""
    return float((shares.mean() - 1 / count) / (1 - 1 / count))


def _quotient(a: np.ndarray, b: np.ndarray, otherwise: float) -> np.ndarray:
    """``a / b``, and ``otherwise`` where b is 0."""
    whole = np.broadcast_to(b, a.shape)
    return np.divide(a, whole, out=np.full(a.shape, otherwise), where=whole > 0)


def _shannon(p: np.ndarray, axis: int) -> np.ndarray:
    """Entropy in nats, with ``0 log 0 = 0``."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=axis)
