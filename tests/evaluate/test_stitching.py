from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from headgate.evaluate.stitching import (
    Affine,
    Procrustes,
    Relative,
    Shuffled,
    affine,
    latent_communication,
    procrustes,
    stitching_matrix,
)
from headgate.evaluate.stitching_reference import (
    affine_reference,
    latent_communication_reference,
    procrustes_residual_reference,
)


def world(seed: int = 0, n: int = 240, dim: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of three classes and 60 anchor items."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((3, dim))
    y = rng.integers(0, 3, n)
    anchors = centres[rng.integers(0, 3, 60)] + rng.standard_normal((60, dim))
    return centres[y] + rng.standard_normal((n, dim)), y, anchors


def rotations(dim: int = 6) -> list[Any]:
    """Three encoders that differ by a rotation."""
    matrices = ortho_group.rvs(dim, size=3, random_state=0)
    return [lambda x, q=q: x @ q for q in matrices]


def fitted_heads(encoders: list[Any], x: np.ndarray, y: np.ndarray, see: Any) -> list[Any]:
    return [LogisticRegression().fit(see(encoder), y).predict for encoder in encoders]


def test_stitching_scores_head_j_on_encoder_i() -> None:
    encoders: list[Any] = [lambda x: x, lambda x: -x]
    heads: list[Any] = [lambda z: (z[:, 0] > 0).astype(int), lambda z: (z[:, 0] < 1).astype(int)]
    x = np.array([[1.0], [2.0], [-1.0], [-3.0]])
    y = np.array([1, 1, 0, 0])
    result = stitching_matrix(encoders, heads, x, y)
    # head 1 on encoder 0 sees 1, 2, -1, -3 and answers 0, 0, 1, 1; on encoder 1 the reverse
    assert result.scores.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (result.diagonal, result.off_diagonal, result.ratio, result.undefined) == (1.0, 0.0, 0.0, {})
    lopsided = stitching_matrix(encoders, [heads[0], heads[0]], x, y)
    assert lopsided.scores.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert (lopsided.diagonal, lopsided.off_diagonal, lopsided.ratio) == (0.5, 0.5, 1.0)


def test_absolute_stitching_of_other_widths_is_nan_with_the_reason_not_zero() -> None:
    encoders: list[Any] = [lambda x: x[:, :2], lambda x: x[:, :3], lambda x: x[:, 1:3]]
    heads: list[Any] = [lambda z: (z[:, 0] > 0).astype(int)] * 3
    x, y = np.random.default_rng(0).standard_normal((20, 4)), np.arange(20) % 2
    result = stitching_matrix(encoders, heads, x, y)
    assert np.isnan(result.scores).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert set(result.undefined) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert result.undefined[0, 1] == "encoder 0 has dim=2, head 1 expects dim=3"
    assert result.off_diagonal == pytest.approx((result.scores[0, 2] + result.scores[2, 0]) / 2)
    alone = stitching_matrix(encoders[:2], heads[:2], x, y)
    assert np.isnan(alone.off_diagonal)
    assert np.isnan(alone.ratio)
    assert 0 <= alone.diagonal <= 1


def test_rotated_spaces_stitch_through_relative_procrustes_and_affine_but_not_plainly_or_shuffled() -> None:
    x, y, anchors = world()
    encoders = rotations()
    absolute = fitted_heads(encoders, x, y, lambda encoder: encoder(x))
    relative = fitted_heads(encoders, x, y, lambda encoder: Relative().own(encoder(x), encoder(anchors)))

    def stitched(heads: list[Any], transform: Any) -> Any:
        return stitching_matrix(
            encoders, heads, x, y, transform=transform, anchors=None if transform is None else anchors
        )

    own = stitched(absolute, None).diagonal
    assert own > 0.95
    assert stitched(absolute, None).off_diagonal < own - 0.3
    for transform in (Procrustes(), Affine()):
        result = stitched(absolute, transform)
        assert result.diagonal == own
        assert result.ratio > 0.99
        assert stitched(absolute, Shuffled(transform)).off_diagonal < own - 0.2
    through = stitched(relative, Relative())
    assert through.scores == pytest.approx(np.full((3, 3), through.diagonal), abs=1e-12)
    broken = stitched(relative, Shuffled(Relative(), seed=1))
    assert broken.diagonal == through.diagonal
    assert broken.off_diagonal < through.diagonal - 0.2


def test_stitching_through_a_transform_bridges_other_widths() -> None:
    x, y, anchors = world()
    embed = np.linalg.qr(np.random.default_rng(4).standard_normal((9, 6)))[0]
    encoders: list[Any] = [lambda z: z, lambda z: z @ embed.T]
    heads = fitted_heads(encoders, x, y, lambda encoder: encoder(x))
    for transform in (Procrustes(), Affine()):
        result = stitching_matrix(encoders, heads, x, y, transform=transform, anchors=anchors)
        assert result.off_diagonal > 0.99 * result.diagonal
        assert result.undefined == {}
    heads = fitted_heads(encoders, x, y, lambda encoder: Relative().own(encoder(x), encoder(anchors)))
    assert stitching_matrix(encoders, heads, x, y, transform=Relative(), anchors=anchors).ratio == pytest.approx(1.0)


def test_relative_representations_are_cosines_or_scaled_products_with_anchors() -> None:
    features, anchors = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, -4.0]])
    assert Relative().own(features, anchors) == pytest.approx(np.array([[0.6, 0.8, -1.0]]))
    assert Relative("inner").own(features, anchors) == pytest.approx(np.array([[3, 8, -25]]) / np.sqrt(2))
    offset = np.array([10.0, -20.0])
    centred = Relative(center=True)
    base = centred.own(features, anchors)
    assert centred.own(features + offset, anchors + offset) == pytest.approx(base)
    assert Relative().own(features + offset, anchors + offset) != pytest.approx(base, abs=0.1)
    rotation = ortho_group.rvs(2, random_state=0)
    assert Relative().across(5 * features @ rotation, 5 * anchors @ rotation, anchors) == pytest.approx(
        Relative().own(features, anchors)
    )


def test_relative_refuses_zero_vectors_unless_told_to_ignore_them() -> None:
    anchors = np.eye(2)
    with pytest.raises(ValueError, match=r"features must .* no zero vector"):
        Relative().own(np.zeros((1, 2)), anchors)
    assert Relative(zero="ignore").own(np.zeros((1, 2)), anchors).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="similarity must be one of"):
        Relative("l2")  # type: ignore[arg-type]


def test_heads_receive_what_their_own_encoder_returns() -> None:
    seen: list[Any] = []

    def head(z: Any) -> Any:
        seen.append((type(z), z.dtype))
        return torch.as_tensor(z)[:, :2].float()

    encoders: list[Any] = [lambda x: torch.from_numpy(x).float(), lambda x: x.astype(np.float64)]
    stitching_matrix(encoders, [head, head], np.random.default_rng(0).standard_normal((5, 3)), np.zeros(5, dtype=int))
    assert seen == [(torch.Tensor, torch.float32), (np.ndarray, np.float64)] * 2


def test_modules_run_in_eval_mode_without_gradients_and_get_their_mode_back() -> None:
    torch.manual_seed(0)
    encoders = [nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)) for _ in range(2)]
    heads = [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)]
    heads[0][0].eval()
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    first, second = (stitching_matrix(encoders, heads, x, y).scores for _ in range(2))
    assert np.array_equal(first, second)
    assert encoders[0].training
    assert encoders[0][1].training
    assert heads[0].training
    assert not heads[0][0].training
    assert int(heads[1][0].num_batches_tracked) == 0


def test_stitching_takes_a_mean_squared_error_or_any_metric() -> None:
    x = np.random.default_rng(0).standard_normal((10, 3))
    encoders: list[Any] = [lambda z: z, lambda z: 2 * z]
    heads: list[Any] = [lambda z: z, lambda z: z / 2]
    result = stitching_matrix(encoders, heads, x, x, metric="mse")
    expected = np.array([[0.0, 0.25], [1.0, 0.0]]) * (x**2).mean()
    assert result.scores == pytest.approx(expected)
    assert result.off_diagonal == pytest.approx(0.625 * (x**2).mean())
    assert np.isnan(result.ratio)
    own = stitching_matrix(encoders, heads, x, x, metric=lambda y, z: float(np.abs(y - z).max()))
    assert own.scores[1, 0] == pytest.approx(np.abs(x).max())


def test_accuracy_takes_scores_and_gives_ties_to_the_first_class() -> None:
    identity: Any = lambda z: z  # noqa: E731
    x = np.array([[1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    assert stitching_matrix([identity] * 2, [identity] * 2, x, np.array([0, 1, 0])).diagonal == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": [lambda z: z]}, ValueError, "2 encoders, 1 heads"),
        ({"encoders": [lambda x: x], "heads": [lambda z: z]}, ValueError, "at least 2, got 1"),
        ({"anchors": np.ones((4, 2))}, ValueError, "anchors needs transform, got transform=None"),
        ({"transform": Relative()}, ValueError, "transform needs anchors, got anchors=None"),
        ({"y": np.zeros(4, dtype=int)}, ValueError, "same length, got y=4, encoder_0=5"),
        ({"y": np.zeros(5)}, TypeError, "y must hold integers"),
        ({"encoders": [lambda x: x, lambda x: x * np.nan]}, ValueError, "features of encoder 1 must be finite"),
        ({"encoders": [lambda x: x, lambda x: "no"]}, TypeError, "features of encoder 1"),
        ({"heads": [lambda z: z[:3], lambda z: z]}, ValueError, "output of a head must have one entry per row"),
        ({"metric": "f1"}, ValueError, "metric must be one of 'accuracy', 'mse'"),
        ({"metric": "mse"}, ValueError, "must have the same shape"),
    ],
)
def test_stitching_refuses_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "encoders": [lambda x: x] * 2,
        "heads": [lambda z: z] * 2,
        "X": np.ones((5, 2)),
        "y": np.zeros(5, dtype=int),
    }
    with pytest.raises(error, match=message):
        stitching_matrix(**(arguments | change))


def test_stitching_refuses_anchors_of_other_numbers() -> None:
    encoders: list[Any] = [lambda x: x, lambda x: x[: min(len(x), 6)]]
    with pytest.raises(ValueError, match="anchors_of_encoder_0=8, anchors_of_encoder_1=6"):
        stitching_matrix(
            encoders,
            [lambda z: z] * 2,
            np.ones((5, 2)),
            np.zeros(5, dtype=int),
            transform=Affine(),
            anchors=np.ones((8, 2)),
        )


@pytest.mark.parametrize("k", [1, 5, 40])
def test_latent_communication_equals_its_definition(k: int) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((40, 5))
    second = first + rng.standard_normal((40, 5))
    expected = latent_communication_reference(first, second, k)
    found = latent_communication(first, second, k)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12)


def test_latent_communication_of_a_hand_computed_case() -> None:
    # The vectors swap, so each finds the other's item first and its own second.
    first, second = np.array([[1.0, 0.1], [0.1, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    one, two = latent_communication(first, second, 1), latent_communication(first, second, 2)
    assert (one["jaccard"], one["mrr"]) == (0.0, 0.0)
    assert (two["jaccard"], two["mrr"]) == (1.0, 0.5)
    assert one["cosine"] == pytest.approx(0.1 / np.sqrt(1.01))
    assert one["l2"] == pytest.approx(np.sqrt(1 + 0.81))


def test_latent_communication_of_equal_spaces_is_perfect() -> None:
    z = np.random.default_rng(1).standard_normal((30, 4))
    assert latent_communication(z, z) == pytest.approx({"jaccard": 1.0, "mrr": 1.0, "cosine": 1.0, "l2": 0.0})
    scaled = latent_communication(z, 3 * z)
    assert (scaled["jaccard"], scaled["mrr"]) == (1.0, 1.0)


def test_latent_communication_is_unchanged_by_a_common_rotation_by_order_and_by_chunk() -> None:
    rng = np.random.default_rng(2)
    first = rng.standard_normal((50, 5))
    second = first + 0.7 * rng.standard_normal((50, 5))
    base = latent_communication(first, second, 5)
    rotation, order = ortho_group.rvs(5, random_state=0), rng.permutation(50)
    assert latent_communication(first @ rotation, second @ rotation, 5) == pytest.approx(base)
    assert latent_communication(first[order], second[order], 5) == pytest.approx(base)
    for chunk in (1, 7, 50):
        assert latent_communication(first, second, 5, chunk=chunk) == pytest.approx(base)
    assert latent_communication(first @ rotation, second, 5)["mrr"] < base["mrr"] - 0.2


def test_latent_communication_refuses_bad_input() -> None:
    z = np.random.default_rng(0).standard_normal((12, 3))
    with pytest.raises(ValueError, match="Z1 and Z2 must have the same dim, got Z1=3, Z2=2"):
        latent_communication(z, z[:, :2])
    with pytest.raises(ValueError, match="same length"):
        latent_communication(z, z[:11])
    with pytest.raises(ValueError, match=r"k must be in \[1, 12\], got 13"):
        latent_communication(z, z, 13)
    broken = z.copy()
    broken[3] = 0
    with pytest.raises(ValueError, match=r"Z2 must .* no zero vector.* one in row 3"):
        latent_communication(z, broken)
    assert latent_communication(z, broken, zero="ignore")["mrr"] < 1
    broken[5, 1] = np.inf
    with pytest.raises(ValueError, match="Z1 must be finite, got infinite value in row 5"):
        latent_communication(broken, z)


def test_procrustes_finds_a_rotation_and_equals_scipy() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((30, 5))
    rotation = ortho_group.rvs(5, random_state=1)
    exact = procrustes(x, x @ rotation + 7)
    assert exact.matrix == pytest.approx(rotation)
    assert exact.residual == pytest.approx(0, abs=1e-20)
    assert exact(x) == pytest.approx(x @ rotation + 7)
    y = rng.standard_normal((30, 5))
    expected, _ = orthogonal_procrustes(x - x.mean(0), y - y.mean(0))
    found = procrustes(x, y)
    assert found.matrix == pytest.approx(expected)
    assert found.residual == pytest.approx(procrustes_residual_reference(x, y))
    assert found.matrix.T @ found.matrix == pytest.approx(np.eye(5), abs=1e-12)


def test_procrustes_residual_is_least_among_rotations() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((20, 3))
    a, b = x - x.mean(0), y - y.mean(0)
    least = procrustes(x, y).residual
    for seed in range(50):
        other = a @ ortho_group.rvs(3, random_state=seed)
        assert ((other - b) ** 2).sum() / (b**2).sum() >= least - 1e-12


def test_procrustes_residual_is_unchanged_by_rotating_and_moving_either_side_and_by_order() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((25, 4)), rng.standard_normal((25, 4))
    base = procrustes(x, y).residual
    order = rng.permutation(25)
    q, r = ortho_group.rvs(4, size=2, random_state=6)
    assert procrustes(x @ q + 3, y @ r - 8).residual == pytest.approx(base)
    assert procrustes(x[order], y[order]).residual == pytest.approx(base)


@pytest.mark.parametrize(("dim_x", "dim_y"), [(3, 5), (5, 3)])
def test_procrustes_pads_the_narrower_space_with_zeros(dim_x: int, dim_y: int) -> None:
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((20, dim_x)), rng.standard_normal((20, dim_y))
    padded_x = np.pad(x, ((0, 0), (0, 5 - dim_x)))
    padded_y = np.pad(y, ((0, 0), (0, 5 - dim_y)))
    found = procrustes(x, y)
    assert found.matrix.shape == (dim_x, dim_y)
    assert found.residual == pytest.approx(procrustes_residual_reference(padded_x, padded_y))
    rotation, _ = orthogonal_procrustes(padded_x - padded_x.mean(0), padded_y - padded_y.mean(0))
    assert found(x) == pytest.approx(((padded_x - padded_x.mean(0)) @ rotation)[:, :dim_y] + y.mean(0), abs=1e-7)


def test_a_narrow_space_embedded_in_a_wide_one_is_found() -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((40, 3))
    embed = np.linalg.qr(rng.standard_normal((6, 3)))[0].T
    there, back = procrustes(x, x @ embed), procrustes(x @ embed, x)
    assert there.residual == pytest.approx(0, abs=1e-20)
    assert there(x) == pytest.approx(x @ embed)
    assert back(x @ embed) == pytest.approx(x)


@pytest.mark.parametrize("n", [5, 40])
def test_affine_equals_the_normal_equations_and_scikit_learn(n: int) -> None:
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((n, 8)), rng.standard_normal((n, 3))
    found = affine(x, y, 0.1)
    assert found.matrix == pytest.approx(affine_reference(x, y, 0.1))
    alpha = 0.1 * ((x - x.mean(0)) ** 2).sum() / 8
    model = Ridge(alpha=alpha).fit(x, y)
    assert found.matrix == pytest.approx(model.coef_.T)
    assert found(x) == pytest.approx(model.predict(x))
    centred = y - y.mean(0)
    assert found.residual == pytest.approx(((model.predict(x) - y) ** 2).sum() / (centred**2).sum())


def test_affine_is_unchanged_in_its_fit_by_the_scale_of_the_source() -> None:
    rng = np.random.default_rng(9)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 4))
    assert affine(1000 * x + 5, y)(1000 * x + 5) == pytest.approx(affine(x, y)(x))


def test_affine_without_penalty_is_least_squares_even_with_few_items() -> None:
    rng = np.random.default_rng(10)
    x, y = rng.standard_normal((5, 8)), rng.standard_normal((5, 2))
    found = affine(x, y, 0.0)
    assert found.residual == pytest.approx(0, abs=1e-20)
    expected = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=1e-12)[0]
    assert found.matrix == pytest.approx(expected)


def test_affine_fits_at_least_as_well_as_procrustes_and_shuffled_anchors_fit_worst() -> None:
    rng = np.random.default_rng(11)
    x = rng.standard_normal((200, 4))
    y = x @ ortho_group.rvs(4, random_state=2) * np.array([1.0, 2, 3, 4]) + 0.1 * rng.standard_normal((200, 4))
    assert affine(x, y).residual < procrustes(x, y).residual < 1
    assert affine(x[rng.permutation(200)], y).residual > 0.9


def test_maps_say_when_the_target_is_constant_and_when_the_width_is_wrong() -> None:
    x = np.random.default_rng(0).standard_normal((11, 2))
    for fit in (procrustes, affine):
        with pytest.warns(RuntimeWarning, match=f"residual of {fit.__name__} is undefined .*Y is constant"):
            constant = fit(x, np.full((11, 3), 0.1))
        assert np.isnan(constant.residual)
        assert affine(x, x)(x[:1]).shape == (1, 2)
    with pytest.raises(ValueError, match=r"Z must have dim=2, got shape \(11, 1\)"):
        procrustes(x, x)(x[:, :1])
    with pytest.raises(ValueError, match="ridge must be at least 0, got ridge=-1"):
        affine(x, x, -1)
    with pytest.raises(ValueError, match="same length"):
        procrustes(x, x[:10])


def test_a_constant_source_maps_everything_to_the_mean_of_the_target() -> None:
    y = np.random.default_rng(0).standard_normal((6, 2))
    assert affine(np.ones((6, 3)), y)(np.zeros((1, 3)))[0] == pytest.approx(y.mean(0))
    assert affine(np.ones((6, 3)), y).residual == pytest.approx(1.0)
