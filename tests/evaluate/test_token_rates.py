"""Rates and sparsity of tokens: their definitions, hand-computed cases, invariances, gradients, reports, refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.evaluate import coding_rate
from headgate.evaluate.token_rates import (
    LayerModules,
    LayerRates,
    RateTable,
    layerwise_report,
    projected_coding_rate,
    sparse_rate_reduction,
    subspace_coding_rate,
    token_coding_rate,
    zero_share,
)
from headgate.evaluate.token_rates_reference import (
    sparse_rate_reduction_reference,
    subspace_coding_rate_reference,
    token_coding_rate_reference,
)
from headgate.nn import VisionTransformer


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspaces(seed: int, heads: int, dim: int, head_dim: int) -> Tensor:
    """Orthonormal bases that are orthogonal to each other."""
    columns = torch.linalg.qr(gaussian(seed, dim, heads * head_dim))[0]
    return columns.unflatten(1, (heads, head_dim)).permute(1, 0, 2)


# --- coding rates ---------------------------------------------------------------------------------------------------


def test_rate_of_a_hand_computed_case() -> None:
    # ZᵀZ = diag(4, 9), d/(N ε²) = 2/(2 · 0.25) = 4
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert float(token_coding_rate(z, 0.25, normalize=False)) == pytest.approx(0.5 * np.log(17 * 37))
    assert float(token_coding_rate(z, 0.25)) == pytest.approx(np.log(5))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("eps2", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_rates_equal_their_definitions_on_either_side(shape: tuple[int, int], eps2: float, normalize: bool) -> None:
    z = gaussian(0, 3, *shape)
    expected = [token_coding_rate_reference(sample.numpy(), eps2, normalize) for sample in z]
    torch.testing.assert_close(token_coding_rate(z, eps2, normalize), torch.tensor(expected, dtype=z.dtype))
    bases = gaussian(1, 2, shape[1], 3)
    expected = [subspace_coding_rate_reference(sample.numpy(), bases.numpy(), eps2, normalize) for sample in z]
    found = subspace_coding_rate(z, bases, eps2, normalize)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=z.dtype))
    torch.testing.assert_close(projected_coding_rate(z[:, None] @ bases, eps2, normalize), found)


def test_rate_of_features_and_of_tokens_is_one() -> None:
    z = gaussian(2, 30, 5)
    assert float(token_coding_rate(z, 0.04, normalize=False)) == pytest.approx(coding_rate(z, 0.2))
    assert float(token_coding_rate(z, 0.04)) == pytest.approx(coding_rate(z, 0.2, normalize=True))


def test_rates_do_not_depend_on_order_of_tokens_or_rotation_and_unit_rates_not_on_length() -> None:
    z = gaussian(3, 20, 6)
    rotation = torch.linalg.qr(gaussian(4, 6, 6))[0]
    base = token_coding_rate(z, normalize=False)
    torch.testing.assert_close(token_coding_rate(z.flip(0) @ rotation, normalize=False), base)
    lengths = torch.linspace(0.01, 50, 20, dtype=z.dtype)[:, None]
    torch.testing.assert_close(token_coding_rate(lengths * z), token_coding_rate(z))
    assert token_coding_rate(2 * z, normalize=False) > base > token_coding_rate(z, eps2=0.02, normalize=False)


def test_a_token_of_zeros_stays_zero_and_costs_nothing() -> None:
    z = gaussian(5, 4, 3)
    z[2] = 0
    kept = z[[0, 1, 3]]
    # The sum over tokens lacks one; N does not.
    expected = token_coding_rate(kept, 0.01 * 4 / 3)
    torch.testing.assert_close(token_coding_rate(z, 0.01), expected)
    z.requires_grad_()
    token_coding_rate(z).backward()
    assert torch.isfinite(z.grad).all()
    assert float(token_coding_rate(torch.zeros(5, 3))) == 0


def test_gradients_of_rates_are_those_of_their_values() -> None:
    z, bases = gaussian(6, 2, 5, 4).requires_grad_(), gaussian(7, 2, 4, 2).requires_grad_()
    for normalize in (False, True):
        assert torch.autograd.gradcheck(lambda x, n=normalize: token_coding_rate(x, 0.1, n), (z,))
        assert torch.autograd.gradcheck(lambda x, u, n=normalize: subspace_coding_rate(x, u, 0.1, n), (z, bases))


def test_steps_along_the_gradient_lower_the_rate_against_subspaces() -> None:
    bases = subspaces(8, 4, 32, 4)
    z = nn.functional.normalize(gaussian(9, 256, 32), dim=-1)
    values = [float(subspace_coding_rate(z, bases, 0.05))]
    for _ in range(5):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(subspace_coding_rate(z, bases, 0.05), z)
        z = (z - 0.5 * gradient).detach()
        values.append(float(subspace_coding_rate(z, bases, 0.05)))
    assert all(after < before for before, after in pairwise(values))


def test_a_rate_against_subspaces_does_not_depend_on_their_bases_and_against_everything_is_the_rate() -> None:
    bases, z = subspaces(10, 4, 16, 2), gaussian(12, 30, 16)
    rotations = torch.linalg.qr(gaussian(11, 4, 2, 2))[0]
    torch.testing.assert_close(subspace_coding_rate(z, bases @ rotations), subspace_coding_rate(z, bases))
    whole = torch.eye(16, dtype=z.dtype)[None]
    torch.testing.assert_close(subspace_coding_rate(z, whole), token_coding_rate(z, normalize=False))
    # Tokens that are orthogonal to a subspace cost nothing against it.
    outside = z - z @ bases[0] @ bases[0].mT
    assert float(subspace_coding_rate(outside, bases[:1])) == pytest.approx(0, abs=1e-12)


def test_the_objective_equals_its_definition_and_is_the_sum_of_its_terms() -> None:
    z, bases = gaussian(13, 2, 7, 4).clamp_min(0), gaussian(14, 3, 4, 2)
    found = sparse_rate_reduction(z, bases, 0.05, lambd=0.3)
    expected = [sparse_rate_reduction_reference(s.numpy(), bases.numpy(), 0.05, 0.3) for s in z]
    torch.testing.assert_close(found.objective, torch.tensor(expected, dtype=z.dtype))
    torch.testing.assert_close(found.rate, token_coding_rate(z, 0.05, normalize=False))
    torch.testing.assert_close(found.subspace_rate, subspace_coding_rate(z, bases, 0.05))
    assert found.nonzeros.tolist() == [int((s != 0).sum()) for s in z]


def test_zero_share_counts_exact_zeros_alone() -> None:
    z = torch.tensor([[[0.0, 1e-30], [-0.0, 2.0]], [[1.0, 1.0], [1.0, 0.0]]])
    assert zero_share(z).tolist() == [0.5, 0.25]
    assert zero_share(z[0]).shape == ()


def test_half_precision_is_measured_in_full() -> None:
    z = gaussian(15, 40, 8)
    low = z.bfloat16()
    # ε² so small that p/(N ε²) times a Gram matrix in half precision would be far off.
    found = token_coding_rate(low, 1e-6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_coding_rate(low.double(), 1e-6).float())


def test_arrays_give_arrays_of_their_kind() -> None:
    z, bases = gaussian(16, 2, 6, 4), gaussian(17, 2, 4, 2)
    array = z.float().numpy()
    for found, expected in (
        (token_coding_rate(array), token_coding_rate(z.float())),
        (subspace_coding_rate(array, bases.numpy()), subspace_coding_rate(z.float(), bases)),
        (zero_share(array), zero_share(z)),
        (sparse_rate_reduction(array, bases.numpy()).rate, sparse_rate_reduction(z.float(), bases).rate),
    ):
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: token_coding_rate(z, 0.0), ValueError, "eps2 must be positive"),
        (lambda z: token_coding_rate(z[0, 0]), ValueError, r"z must have shape \(..., tokens, dim\)"),
        (lambda z: token_coding_rate(z[:, :0]), ValueError, "all sizes positive"),
        (lambda z: token_coding_rate(z.long()), TypeError, "z must be floating point"),
        (lambda z: token_coding_rate([1.0]), TypeError, "z must be a NumPy array or a torch tensor"),
        (lambda z: token_coding_rate(z / 0), ValueError, "z must be finite"),
        (lambda z: projected_coding_rate(z[0]), ValueError, "heads, tokens, head_dim"),
        (lambda z: subspace_coding_rate(z, torch.ones(2, 3, 2)), ValueError, "bases must have shape.*dim=4"),
        (lambda z: subspace_coding_rate(z, torch.ones(1, 2, 4, 2)), ValueError, "bases must have shape"),
        (lambda z: sparse_rate_reduction(z, torch.ones(2, 4, 2), lambd=-1), ValueError, "lambd must be at least 0"),
        (lambda z: zero_share(z.bool()), TypeError, "floating point"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, 5, 4))


# --- reports --------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two layers with a projection of two heads and a ReLU each; knows where to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Sequential(nn.Dropout(0.5), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for projection, output in zip(self.projections, self.outputs, strict=True):
            x = output(x + nn.functional.pad(projection(x), (0, 2)))
        return x

    def rate_layers(self) -> dict[str, LayerModules]:
        return {f"layer {i}": LayerModules(f"projections.{i}", 2, f"outputs.{i}") for i in range(2)}


def test_a_report_holds_the_measures_of_every_layer() -> None:
    torch.manual_seed(0)
    model, x = Layers(), gaussian(20, 5, 7, 6).float()
    report = layerwise_report(model, x, eps2=0.02)
    assert list(report.rows) == ["layer 0", "layer 1"]
    for index, row in enumerate(report.rows.values()):
        w = model.projections[index](x).detach()
        rates = projected_coding_rate(w.unflatten(-1, (2, 2)).transpose(1, 2), 0.02)
        x = (x + nn.functional.pad(w, (0, 2))).relu()
        assert row.coding_rate == pytest.approx(float(rates.mean()), rel=1e-6)
        assert row.coding_rate_std == pytest.approx(float(rates.std()), rel=1e-5)
        assert row.zeros == pytest.approx(float((x == 0).float().mean()))
        assert row.nonzeros == 1 - row.zeros
    assert report.column("zeros") == [row.zeros for row in report.rows.values()]


def test_a_report_leaves_the_model_as_it_was() -> None:
    model = Layers()
    model.train()
    model.outputs[1].eval()
    modes = [module.training for module in model.modules()]
    layerwise_report(model, gaussian(21, 2, 3, 6).float())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="tokens"):
        layerwise_report(model, gaussian(21, 3, 6).float())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_one_sample_has_no_deviation() -> None:
    row = layerwise_report(Layers(), gaussian(22, 1, 3, 6).float()).rows["layer 0"]
    assert row.coding_rate_std == 0
    assert row.coding_rate > 0


def test_any_network_can_be_read_by_the_names_of_its_modules() -> None:
    model = VisionTransformer(12, 2, 3, img_size=8, patch_size=4, num_classes=0)
    images = gaussian(23, 4, 3, 8, 8).float()
    layers = {str(i): LayerModules(f"blocks.{i}.mixer.qkv", 3, f"blocks.{i}.mlp.fc1", (24, 36)) for i in range(2)}
    report = layerwise_report(model, images, layers)
    tokens = model._embed(images)
    values = model.blocks[0].mixer.qkv(model.blocks[0].mixer_norm(tokens))[..., 24:].detach()
    rates = projected_coding_rate(values.unflatten(-1, (3, 4)).transpose(1, 2))
    assert report.rows["0"].coding_rate == pytest.approx(float(rates.mean()), rel=1e-5)
    by_keyword = layerwise_report(model, {"images": images}, layers)
    assert by_keyword == report


def test_a_table_correlates_with_depth_by_ranks() -> None:
    def table(*rates: float) -> RateTable:
        return RateTable({str(i): LayerRates(rate, 0.0, 0.5) for i, rate in enumerate(rates)})

    assert table(9.0, 7.0, 6.5, 1.0).depth_correlation("coding_rate") == pytest.approx(-1)
    # One swap of neighbours among four: 1 - 6 · 2 / (4 · 15).
    assert table(1.0, 3.0, 2.0, 4.0).depth_correlation("coding_rate") == pytest.approx(0.8)
    with pytest.warns(RuntimeWarning, match="zeros has one value in all 2 layers"):
        assert np.isnan(table(1.0, 2.0).depth_correlation("zeros"))


def test_a_table_is_written_in_markdown() -> None:
    text = RateTable({"first": LayerRates(12.345, 0.5, 0.25)}).to_markdown()
    assert text.splitlines()[-1] == "| first | 12.35 | 0.50 | 0.7500 |"


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({}, ValueError, "at least one layer"),
        ({"a": LayerModules("projections.7", 2, "outputs.0")}, ValueError, r"layers\['a'\].*got 'projections.7'"),
        ({"a": LayerModules("projections.0", 3, "outputs.0")}, ValueError, "num_heads must divide channels"),
        ({"a": LayerModules("projections.0", 2, "outputs.0", (2, 9))}, ValueError, "channels must lie within the 4"),
    ],
)
def test_places_that_do_not_fit_are_refused(
    layers: dict[str, LayerModules], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layerwise_report(Layers(), torch.ones(2, 3, 6), layers)


def test_a_model_that_does_not_know_its_layers_needs_them_named() -> None:
    with pytest.raises(TypeError, match=r"layers must be given.*got None for a Linear"):
        layerwise_report(nn.Linear(2, 2), torch.ones(1, 2, 2))


def test_modules_must_run_once_and_give_tensors() -> None:
    class Twice(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    with pytest.raises(ValueError, match="must run once in a pass, one of them ran 2 times"):
        layerwise_report(Twice(), torch.ones(2, 3, 6))

    class Gives(Layers):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.wrap = nn.Identity()
            self.wrap.forward = wrap  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            self.wrap(x)
            return super().forward(x)

    with pytest.raises(TypeError, match="module 'wrap' must give a tensor, got dict"):
        layerwise_report(
            Gives(lambda x: {"x": x}), torch.ones(2, 3, 6), {"a": LayerModules("projections.0", 2, "wrap")}
        )
    report = layerwise_report(
        Gives(lambda x: (x, None)), torch.ones(2, 3, 6), {"a": LayerModules("projections.0", 2, "wrap")}
    )
    assert report.rows["a"].zeros == 0
