from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import ortho_group
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score

from headgate.evaluate.disentanglement import (
    dci,
    importance_scores,
    infomec,
    mig,
    mutual_information,
)
from headgate.evaluate.disentanglement_reference import (
    knn_information_reference,
    modularity_reference,
    plugin_information_reference,
)


def grid(*cards: int, repeats: int = 1) -> np.ndarray:
    """Every combination of the sources' values."""
    axes = np.meshgrid(*[np.arange(card) for card in cards], indexing="ij")
    return np.tile(np.stack([axis.ravel() for axis in axes], axis=1), (repeats, 1))


def noisy(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Three sources and five continuous latents, two of which mix sources."""
    rng = np.random.default_rng(seed)
    sources = np.stack([rng.integers(0, card, n) for card in (3, 4, 5)], axis=1)
    clean = np.concatenate([sources, sources[:, :1] + sources[:, 1:2], sources[:, 1:2] - sources[:, 2:]], axis=1)
    return sources, clean + 0.4 * rng.standard_normal((n, 5))


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_infomec_agrees_with_the_golden_values(shared_dir: Path, kind: str) -> None:
    path = shared_dir / "golden" / "latent-quantization" / "infomec"
    stored = json.loads(path.with_suffix(".json").read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    found = infomec(tensors["sources"], tensors[f"latents_{kind}"], discrete=kind == "discrete")
    scores, tolerance = stored["scalars"][kind], stored["tolerance"]
    assert found.infom == pytest.approx(scores["infom"], abs=tolerance["infom"])
    assert found.infoc == pytest.approx(scores["infoc"], abs=tolerance["infoc"])
    assert found.infoe == pytest.approx(scores["infoe"], abs=tolerance["infoe"])
    assert found.nmi == pytest.approx(tensors[f"nmi_{kind}"], abs=tolerance[f"nmi_{kind}"])
    assert found.active.tolist() == (tensors[f"active_{kind}"] == 1).tolist()


def test_a_perfect_code_scores_one() -> None:
    sources = grid(3, 4, 5, repeats=3)
    found = infomec(sources, sources, discrete=True)
    assert (found.infom, found.infoc) == pytest.approx((1.0, 1.0))
    assert found.infoe > 0.99
    assert found.nmi == pytest.approx(np.eye(3), abs=1e-12)
    continuous = infomec(sources, 2.0 * sources + 1e-3 * np.random.default_rng(0).standard_normal(sources.shape), False)
    assert min(continuous.infom, continuous.infoc, continuous.infoe) > 0.9


def test_a_code_that_mixes_all_sources_alike_scores_zero_in_modularity() -> None:
    sources = grid(3, 3, repeats=10)
    joint = 3 * sources[:, :1] + sources[:, 1:]
    found = infomec(sources, np.concatenate([joint, joint], axis=1), discrete=True)
    assert found.nmi == pytest.approx(np.ones((2, 2)))
    assert (found.infom, found.infoc) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert found.infoe > 0.99


def test_redundant_latents_are_modular_but_not_compact() -> None:
    sources = grid(3, 4, repeats=10)
    found = infomec(sources, np.concatenate([sources, sources], axis=1), discrete=True)
    assert found.infom == pytest.approx(1.0)
    # the best of 4 latents holds half of the information: (1/2 - 1/4) / (3/4)
    assert found.infoc == pytest.approx(1 / 3)


def test_modularity_and_compactness_equal_their_definitions() -> None:
    sources, latents = noisy()
    found = infomec(sources, latents, discrete=False)
    assert found.active.all()
    infom, infoc = modularity_reference(found.nmi)
    assert (found.infom, found.infoc) == pytest.approx((infom, infoc))
    entropy = [plugin_information_reference(column, column) for column in sources.T]
    information = [[knn_information_reference(s, (z - z.mean()) / z.std()) for z in latents.T] for s in sources.T]
    assert found.nmi == pytest.approx(np.array(information) / np.array(entropy)[:, None], abs=1e-9)


def test_explicitness_is_zero_for_latents_that_say_nothing_and_grows_with_what_they_say() -> None:
    rng = np.random.default_rng(1)
    sources = np.stack([rng.integers(0, 3, 3000), rng.integers(0, 4, 3000)], axis=1)
    noise = rng.standard_normal((3000, 2))
    scores = [infomec(sources, a * sources + noise, False).infoe for a in (0.1, 0.5, 2.0)]
    assert scores[0] == pytest.approx(0, abs=0.02)
    assert scores == sorted(scores)
    assert scores[2] > 0.5


def test_explicitness_null_model_is_log_k_with_unbalanced_sources() -> None:
    rng = np.random.default_rng(2)
    sources = np.stack([(rng.random(2000) < 0.1).astype(int), rng.integers(0, 2, 2000)], axis=1)
    latents = np.stack([rng.standard_normal(2000), sources[:, 1] + 0.5 * rng.standard_normal(2000)], axis=1)
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    z = (latents - latents.mean(0)) / latents.std(0)
    parts = []
    for s in sources.T:
        fits = [LogisticRegression(C=1e9, class_weight="balanced", max_iter=1000).fit(v, s) for v in (0 * z, z)]
        null, full = (log_loss(s, fit.predict_proba(v)) for fit, v in zip(fits, (0 * z, z), strict=True))
        assert null == pytest.approx(np.log(2))
        parts.append(1 - full / null)
    assert infomec(sources, latents, False, zero="ignore").infoe == pytest.approx(np.mean(parts), abs=1e-4)


def test_discrete_codes_are_pruned_if_constant_and_continuous_ones_if_narrow() -> None:
    sources = grid(3, 4, repeats=10)
    constant = np.full((len(sources), 1), 2)
    assert infomec(sources, np.concatenate([constant, sources], axis=1), True).active.tolist() == [False, True, True]
    rng = np.random.default_rng(3)
    wide = np.concatenate([sources, sources[:, :1]], axis=1) + 0.1 * rng.standard_normal((len(sources), 3))
    wide = (wide - wide.min(0)) / np.ptp(wide, axis=0) * np.array([1.0, 0.0501, 0.0499])
    assert infomec(sources, wide, False).active.tolist() == [True, True, False]


def test_infomec_of_codes_does_not_depend_on_their_names_or_on_float_noise() -> None:
    sources = grid(3, 4, repeats=10)
    codes = np.stack([sources[:, 0] + sources[:, 1], sources[:, 1], sources[:, 0]], axis=1)
    base = infomec(sources, codes, True)
    values = np.linspace(-0.5, 0.5, 8)[codes].astype(np.float32)
    noise = 1e-8 * np.random.default_rng(0).standard_normal(values.shape)
    for other in (values, values + noise, -codes, codes * 1_000_003, torch.from_numpy(codes)):
        found = infomec(sources, other, True)
        assert (found.infom, found.infoc) == pytest.approx((base.infom, base.infoc), rel=1e-12)
        assert found.infoe == pytest.approx(base.infoe, abs=1e-3)


@pytest.mark.parametrize("discrete", [True, False])
def test_infomec_does_not_depend_on_order_scale_or_names_of_sources(discrete: bool) -> None:
    sources, latents = noisy(1)
    if discrete:
        latents = np.rint(latents)
    base = infomec(sources, latents, discrete)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(sources))
    columns = rng.permutation(5)
    for found in (
        infomec(sources[order], latents[order], discrete),
        infomec(sources[:, ::-1], latents[:, columns], discrete),
        infomec(10 - 3 * sources, latents, discrete),
        infomec(sources, 7 * latents, discrete),
    ):
        assert (found.infom, found.infoc) == pytest.approx((base.infom, base.infoc), abs=1e-9)
        assert found.infoe == pytest.approx(base.infoe, abs=2e-3)


def test_a_rotation_destroys_modularity_but_not_explicitness() -> None:
    sources = grid(4, 4, 4, repeats=6)
    latents = sources + 0.05 * np.random.default_rng(0).standard_normal(sources.shape)
    rotation = ortho_group.rvs(3, random_state=0)
    straight, turned = infomec(sources, latents, False), infomec(sources, latents @ rotation, False)
    assert turned.infom < straight.infom - 0.4
    assert turned.infoe == pytest.approx(straight.infoe, abs=0.05)
    assert mig(sources, latents @ rotation) < mig(sources, latents) - 0.4


def test_infomec_is_deterministic_under_its_seed() -> None:
    sources, latents = noisy(2)
    tied = np.round(latents, 1)
    assert np.array_equal(infomec(sources, tied, False).nmi, infomec(sources, tied, False, seed=0).nmi)
    assert infomec(sources, tied, False, seed=9).nmi == pytest.approx(infomec(sources, tied, False).nmi, abs=0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sources": np.zeros((99, 2), dtype=int)}, ValueError, "sources must vary, got a constant in column 0"),
        ({"sources": grid(11, 9)[:, :1]}, ValueError, "sources must have at least 2 columns"),
        ({"sources": grid(11, 8)}, ValueError, "same length, got 88 and 99"),
        ({"sources": np.random.default_rng(0).random((99, 2))}, ValueError, "sources must be classes, got 99 values"),
        ({"sources": np.full((99, 2), np.nan)}, ValueError, "sources must be finite"),
        ({"latents": np.full((99, 2), np.inf)}, ValueError, "latents must be finite"),
        (
            {"latents": grid(11, 9)},
            TypeError,
            "latents must be floating point where they are continuous.*are they codes",
        ),
        ({"latents": torch.zeros(99, 2, dtype=torch.int64)}, TypeError, "latents must be floating point"),
        ({"discrete": True}, ValueError, "latents must be codes with discrete=True, got 99 values among 99 samples"),
        ({"latents": np.zeros((99, 3))}, ValueError, "at least 2 columns left after pruning, got 0 of 3"),
        ({"latents": grid(11, 9)[:, :1] + 0.5}, ValueError, "at least 2 columns left after pruning, got 1 of 1"),
        ({"zero": "drop"}, ValueError, "zero must be one of"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_infomec_refuses_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    sources = grid(11, 9)
    arguments: dict[str, Any] = {
        "sources": sources,
        "latents": sources + 0.1 * np.random.default_rng(0).standard_normal((99, 2)),
        "discrete": False,
    }
    with pytest.raises(error, match=message):
        infomec(**(arguments | change))


def test_sources_with_few_non_integer_values_are_classes() -> None:
    sources, latents = noisy(3)
    halves = sources / 2 - 0.25
    assert infomec(halves, latents, False).infom == pytest.approx(infomec(sources, latents, False).infom)


def test_a_kept_latent_that_informs_about_nothing_is_refused_or_pruned() -> None:
    sources = grid(2, 3, 2, repeats=10)
    silent = grid(2, 3, 2, 2, repeats=5)
    sources, spare = silent[:, :3], silent[:, 3:]
    latents = np.concatenate([spare, sources], axis=1)
    with pytest.raises(ValueError, match="got no information in column 0"):
        infomec(sources, latents, True)
    found = infomec(sources, latents, True, zero="ignore")
    assert found.active.tolist() == [False, True, True, True]
    assert found.infom == pytest.approx(1.0)


def test_a_collapsed_code_is_refused_or_has_no_modularity_but_an_explicitness() -> None:
    sources = grid(3, 4, repeats=10)
    code = np.concatenate([sources[:, :1], np.zeros_like(sources)], axis=1)
    with pytest.raises(ValueError, match="at least 2 columns left after pruning, got 1 of 3"):
        infomec(sources, code, True)
    with pytest.warns(RuntimeWarning, match="infomec is undefined .*1 of 3 latents are left"):
        found = infomec(sources, code, True, zero="ignore")
    assert np.isnan([found.infom, found.infoc]).all()
    # one of two sources is read off in full
    assert found.infoe == pytest.approx(0.5, abs=0.01)


def test_a_source_that_no_latent_informs_about_counts_zero_in_compactness() -> None:
    sources = grid(2, 3, 2, repeats=10)
    found = infomec(sources, sources[:, :2], True)
    # of three sources two are compact
    assert found.infoc == pytest.approx(2 / 3)
    assert found.infom == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_knn_estimate_equals_its_definition_and_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[7], rng.integers(0, 5, 150), [8] * 3])  # a class of one, a class of three
    x = labels + (0.2 + seed) * rng.standard_normal(154)
    x = (x - x.mean()) / x.std()
    found = mutual_information(labels[:, None], x[:, None], "knn")
    assert found[0, 0] == pytest.approx(knn_information_reference(labels, x), abs=1e-9)
    expected = mutual_info_classif(x[:, None], labels, discrete_features=False, n_neighbors=10, random_state=0)
    assert found[0] == pytest.approx(expected, abs=1e-9)


def test_knn_estimate_with_ties_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 400)
    x = np.round(labels + rng.standard_normal(400), 1)
    x = (x - x.mean()) / x.std()
    found = mutual_information(labels[:, None], x[:, None], "knn")[0, 0]
    expected = mutual_info_classif(x[:, None], labels, n_neighbors=10, random_state=0)[0]
    assert found == pytest.approx(expected, abs=0.03)


def test_knn_estimate_finds_a_known_value_and_is_clipped_at_zero() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 4000)
    latents = np.stack([10.0 * labels + rng.random(4000), rng.random(4000)], axis=1)
    found = mutual_information(labels[:, None], latents, "knn")[0]
    assert found[0] == pytest.approx(np.log(4), abs=0.01)
    assert found[1] == pytest.approx(0, abs=0.02)
    many = [mutual_information(labels[:100, None], rng.random((100, 1)), "knn")[0, 0] for _ in range(20)]
    assert min(many) == 0.0


def test_histogram_estimate_uses_twenty_equal_bins() -> None:
    rng = np.random.default_rng(6)
    sources = rng.integers(0, 4, (500, 1))
    z = sources + rng.standard_normal((500, 1))
    bins = np.digitize(z[:, 0], np.histogram(z, 20)[1][:-1])
    found = mutual_information(sources, z, "histogram")[0, 0]
    assert found == pytest.approx(mutual_info_score(sources[:, 0], bins))
    assert mutual_information(sources, np.ones((500, 1)), "histogram")[0, 0] == 0.0
    edges = np.array([[0.0], [1.0], [20.0], [19.0]] * 2)
    labels = np.array([[0], [1], [2], [2]] * 2)
    assert mutual_information(labels, edges, "histogram")[0, 0] == pytest.approx(1.5 * np.log(2))


def test_plugin_estimate_equals_its_definition() -> None:
    rng = np.random.default_rng(7)
    sources, codes = rng.integers(0, 3, (60, 2)), rng.integers(0, 6, (60, 3))
    found = mutual_information(sources, codes, "plugin")
    expected = [[plugin_information_reference(s, z) for z in codes.T] for s in sources.T]
    assert found == pytest.approx(np.array(expected))
    assert found[0, 0] == pytest.approx(mutual_info_score(sources[:, 0], codes[:, 0]))
    with pytest.raises(ValueError, match="estimator must be one of"):
        mutual_information(sources, codes, "kde")  # type: ignore[arg-type]


def test_mig_of_a_hand_computed_case() -> None:
    sources = grid(2, 2, repeats=10)
    assert mig(sources, sources, discrete=True) == pytest.approx(1.0)
    assert mig(sources, np.concatenate([sources, sources], axis=1), discrete=True) == pytest.approx(0.0)
    both = 2 * sources[:, :1] + sources[:, 1:]
    # the joint code knows either source in full, the copy of the first one ties with it
    assert mig(sources, np.concatenate([both, sources[:, :1]], axis=1), discrete=True) == pytest.approx(0.5)


def test_mig_cuts_continuous_latents_into_bins() -> None:
    sources, latents = noisy(4)
    information = mutual_information(sources, latents, "histogram")
    entropy = np.array([plugin_information_reference(column, column) for column in sources.T])
    top = np.sort(information, axis=1)
    assert mig(sources, latents) == pytest.approx(((top[:, -1] - top[:, -2]) / entropy).mean())
    order = np.random.default_rng(0).permutation(len(sources))
    assert mig(sources[order], 3 * latents[order][:, ::-1] + 1) == pytest.approx(mig(sources, latents))
    with pytest.raises(ValueError, match="latents must have at least 2 columns"):
        mig(sources, latents[:, :1])
    with pytest.raises(TypeError, match="are they codes"):
        mig(sources, sources)


def test_importance_scores_of_hand_computed_cases() -> None:
    assert importance_scores(np.eye(3)) == pytest.approx((1.0, 1.0))
    assert importance_scores(np.ones((3, 4))) == pytest.approx((0.0, 0.0), abs=1e-12)
    # two latents share source 0: pure but not complete
    matrix = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert importance_scores(matrix) == pytest.approx((1.0, (0.5 + 1.0) / 2))
    # latent 0 serves both sources with weight 2 of 3, latent 1 the second alone
    matrix = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert importance_scores(matrix) == pytest.approx((1 / 3, (1 + 0) / 2))
    # a latent twice as important counts twice: D = 3/4 · 1 + 1/4 · 0
    matrix = np.array([[6.0, 1.0], [0.0, 1.0]])
    assert importance_scores(matrix)[0] == pytest.approx(6 / 8)


def test_importance_scores_skip_idle_latents_and_count_unserved_sources_as_zero() -> None:
    assert importance_scores(np.array([[1.0, 0, 0], [0, 1.0, 0]])) == pytest.approx((1.0, 1.0))
    assert importance_scores(np.array([[1.0, 0], [0, 0]])) == pytest.approx((1.0, 0.5))
    with pytest.warns(RuntimeWarning, match="no latent is of importance"):
        disentanglement, completeness = importance_scores(np.zeros((2, 2)))
    assert np.isnan(disentanglement)
    assert completeness == 0.0
    for bad in (np.ones((1, 3)), np.ones((3, 1)), -np.eye(2)):
        with pytest.raises(ValueError, match="importance must be at least 2 × 2 and not negative"):
            importance_scores(bad)


def test_importance_scores_do_not_depend_on_order() -> None:
    matrix = np.random.default_rng(8).random((4, 6))
    moved = matrix[[2, 0, 3, 1]][:, [5, 1, 0, 4, 2, 3]]
    assert importance_scores(moved) == pytest.approx(importance_scores(matrix))


def test_dci_tells_aligned_from_rotated_codes() -> None:
    rng = np.random.default_rng(9)
    sources = rng.integers(0, 4, (400, 2))
    latents = sources + 0.1 * rng.standard_normal((400, 2))
    aligned = dci(sources, latents)
    turned = dci(sources, latents @ np.array([[0.8, -0.6], [0.6, 0.8]]))
    assert min(aligned.disentanglement, aligned.completeness) > 0.95
    assert aligned.informativeness > 0.98
    assert aligned.importance.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert aligned.importance.argmax(axis=1).tolist() == [0, 1]
    assert max(turned.disentanglement, turned.completeness) < 0.6
    assert (aligned.disentanglement, aligned.completeness) == importance_scores(aligned.importance)


def test_dci_is_deterministic_and_at_chance_for_noise() -> None:
    rng = np.random.default_rng(10)
    sources, noise = rng.integers(0, 4, (300, 2)), rng.standard_normal((300, 2))
    first, second = dci(sources, noise, seed=3), dci(sources, noise, seed=3)
    assert np.array_equal(first.importance, second.importance)
    assert first.informativeness == second.informativeness == pytest.approx(0.25, abs=0.12)
    assert first.disentanglement < 0.1


def test_dci_refuses_bad_input() -> None:
    sources, latents = noisy(5, n=60)
    for fraction in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="test_fraction must lie in"):
            dci(sources, latents, test_fraction=fraction)
    with pytest.raises(ValueError, match="leaves no samples"):
        dci(sources, latents, test_fraction=0.001)
    with pytest.raises(ValueError, match="latents must have at least 2 columns"):
        dci(sources, latents[:, :1])
    with pytest.raises(ValueError, match="same length"):
        dci(sources, latents[:50])
    with pytest.raises(ValueError, match="sources must have at least 2 columns"):
        dci(sources[:, :1], latents)
