"""The layers of CRATE: derived steps against loops, trained layers against their formulas, blocks, refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.evaluate import sparse_rate_reduction, subspace_coding_rate
from headgate.methods.vision.crate import (
    ISTA,
    MSSA,
    CRATEBlock,
    OvercompleteISTA,
    check_step_size,
    ista_objective,
    ista_step,
    mssa_step,
)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspaces(seed: int, heads: int, dim: int, head_dim: int) -> Tensor:
    columns = torch.linalg.qr(gaussian(seed, dim, heads * head_dim))[0]
    return columns.unflatten(1, (heads, head_dim)).permute(1, 0, 2)


# --- derived steps --------------------------------------------------------------------------------------------------


def mssa_step_loop(z: Tensor, bases: Tensor, step: float, scale: float) -> Tensor:
    """Token by token, subspace by subspace."""
    result = (1 - step) * z
    for i in range(len(z)):
        for basis in bases:
            projected = [basis.T @ token for token in z]
            weights = torch.stack([scale * projected[i] @ other for other in projected]).exp()
            mean = sum(w * p for w, p in zip(weights / weights.sum(), projected, strict=True))
            result[i] += step * basis @ mean
    return result


@pytest.mark.parametrize(("step", "scale"), [(0.5, 1.0), (0.25, 8.0), (-0.5, 3.0)])
def test_a_compression_step_equals_its_definition(step: float, scale: float) -> None:
    z, bases = gaussian(0, 2, 6, 8), gaussian(1, 3, 8, 2)
    found = mssa_step(z, bases, step, logit_scale=scale)
    for sample, ours in zip(z, found, strict=True):
        torch.testing.assert_close(ours, mssa_step_loop(sample, bases, step, scale))


def test_a_compression_step_keeps_what_lies_in_the_subspaces_and_shrinks_the_rest() -> None:
    bases = subspaces(2, 2, 8, 2)
    # Projections of one length and large logits: every token sees itself alone, so that its projection stays.
    coordinates = nn.functional.normalize(gaussian(3, 2, 5, 2), dim=-1)
    inside = (coordinates @ bases.mT).sum(dim=0, keepdim=True)
    outside = gaussian(4, 1, 5, 8)
    outside = outside - sum(outside @ basis @ basis.mT for basis in bases)
    torch.testing.assert_close(mssa_step(inside + outside, bases, 0.3, logit_scale=1e4), inside + 0.7 * outside)


def test_a_compression_step_is_about_a_gradient_step_on_the_rate() -> None:
    # For tokens of few nats, softmax weights aside, both pull tokens towards what they share in each subspace.
    bases = subspaces(4, 4, 32, 4)
    z = nn.functional.normalize(gaussian(5, 64, 32), dim=-1).requires_grad_()
    (gradient,) = torch.autograd.grad(subspace_coding_rate(z, bases, 0.05), z)
    moved = mssa_step(z.detach()[None], bases, 0.1, logit_scale=8.0)[0] - z.detach()
    inside = torch.einsum("hdp,hep->de", bases, bases)
    alignment = nn.functional.cosine_similarity((moved @ inside).flatten(), -(gradient @ inside).flatten(), dim=0)
    assert alignment > 0.5


def test_an_ista_step_equals_its_definition() -> None:
    z, y, dictionary = gaussian(6, 3, 4, 10), gaussian(7, 3, 4, 6), gaussian(8, 6, 10)
    found = ista_step(z, y, dictionary, 0.05, 0.3)
    for b in range(3):
        for n in range(4):
            step = z[b, n] + 0.05 * dictionary.T @ (y[b, n] - dictionary @ z[b, n])
            torch.testing.assert_close(found[b, n], (step - 0.05 * 0.3).clamp_min(0))
    both = ista_step(z, y, dictionary, 0.05, 0.3, nonnegative=False)
    step = z + 0.05 * (y - z @ dictionary.T) @ dictionary
    torch.testing.assert_close(both, step.sign() * (step.abs() - 0.015).clamp_min(0))


def test_steps_up_to_the_inverse_of_the_norm_never_raise_the_objective() -> None:
    y, dictionary = gaussian(9, 50, 8), gaussian(10, 8, 12)
    step_size = 1 / float(torch.linalg.matrix_norm(dictionary, ord=2)) ** 2
    z = torch.zeros(50, 12, dtype=y.dtype)
    values, zeros = [float(ista_objective(z, y, dictionary, 0.5))], []
    for _ in range(60):
        z = ista_step(z, y, dictionary, step_size, 0.5)
        values.append(float(ista_objective(z, y, dictionary, 0.5)))
        zeros.append(float((z == 0).double().mean()))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))
    assert values[-1] < 0.7 * values[0]
    assert zeros[-1] > zeros[0]


def test_the_objective_of_a_hand_computed_case() -> None:
    dictionary = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    z, y = torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[1.0, 1.0]])
    # D z = (1.5, -2), rest (-0.5, 3): ½ · 9.25 + 0.2 · 2.5
    assert float(ista_objective(z, y, dictionary, 0.2)) == pytest.approx(4.625 + 0.5)


def test_steps_that_overshoot_are_found() -> None:
    dictionary = torch.diag(torch.tensor([1.0, 2.0]))
    check_step_size(0.49, dictionary)
    with pytest.raises(ValueError, match=r"step_size must be below 2/‖D‖² = 0.5 .* got step_size=0.5"):
        check_step_size(0.5, dictionary)
    check_step_size(100.0, torch.zeros(2, 2))
    y, wide = gaussian(11, 20, 2), dictionary.double()
    z = 3 * y
    for _ in range(5):
        z = ista_step(z, y, wide, 0.8, 0.0, nonnegative=False)
    assert ista_objective(z, y, wide, 0.0) > ista_objective(3 * y, y, wide, 0.0)
    layer = ISTA(16)
    layer.check_step_size()
    layer.step_size = 1.0
    with pytest.raises(ValueError, match="step_size must be below"):
        layer.check_step_size()
    alpha = OvercompleteISTA(16, step_size=1.0)
    with pytest.raises(ValueError, match="step_size must be below"):
        alpha.check_step_size()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: mssa_step(x[0], torch.ones(2, 4, 2)), ValueError, "z must have shape"),
        (lambda x: mssa_step(x, torch.ones(2, 3, 2)), ValueError, "bases must have dim=4"),
        (lambda x: mssa_step(x, torch.ones(2, 4, 2).double()), TypeError, "bases must have the module's dtype"),
        (lambda x: mssa_step(x.long(), torch.ones(2, 4, 2)), TypeError, "z must be floating point"),
        (lambda x: ista_step(x, x, torch.ones(4, 3)), ValueError, "dictionary must have atoms=4"),
        (lambda x: ista_step(x, x, torch.eye(4), 0.0), ValueError, "step_size must be positive"),
        (lambda x: ista_step(x, x, torch.eye(4), 0.1, -1.0), ValueError, "threshold must be at least 0"),
        (lambda x: ista_objective(x, x, torch.ones(3, 4)), ValueError, "dictionary must have dim=4"),
        (lambda x: check_step_size(0.1, torch.ones(3)), ValueError, "dictionary must have shape"),
    ],
)
def test_derived_steps_refuse_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, 5, 4))


# --- subspace attention ---------------------------------------------------------------------------------------------


def test_attention_equals_its_formula_written_out() -> None:
    torch.manual_seed(0)
    layer, x = MSSA(12, 3, head_dim=5).double(), gaussian(20, 2, 7, 12)
    found = layer(x)
    for b in range(2):
        parts = []
        for head in range(3):
            w = x[b] @ layer.qkv.weight[5 * head : 5 * head + 5].T
            parts.append((w @ w.T / math.sqrt(5)).softmax(-1) @ w)
        out = torch.cat(parts, -1) @ layer.to_out[0].weight.T + layer.to_out[0].bias
        torch.testing.assert_close(found[b], out)


def test_tied_output_projects_back_with_the_bases_themselves() -> None:
    torch.manual_seed(0)
    layer, x = MSSA(12, 3, tie_output=True).double(), gaussian(21, 2, 7, 12)
    bases = layer.bases()
    assert bases.shape == (3, 12, 4)
    # With κ = 1 the derived step is the attention alone; its logits have the scale of the trained layer.
    torch.testing.assert_close(layer(x), mssa_step(x, bases, 1.0, logit_scale=0.5))
    assert [name for name, _ in layer.named_parameters()] == ["qkv.weight"]


def test_bases_are_those_that_the_rate_measures_take() -> None:
    torch.manual_seed(0)
    layer, x = MSSA(12, 3).double(), gaussian(22, 2, 7, 12)
    torch.testing.assert_close(layer.project(x), x[:, None] @ layer.bases())
    assert sparse_rate_reduction(x, layer.bases().detach()).objective.shape == (2,)


def test_weights_are_what_the_layer_mixes_with() -> None:
    torch.manual_seed(0)
    layer, x = MSSA(12, 3).double().eval(), gaussian(23, 2, 7, 12)
    weights = layer.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=x.dtype))
    mixed = (weights @ layer.project(x)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.to_out(mixed))
    # The logit of a token with itself is its squared norm, the largest in its row where norms are alike.
    assert (layer.weights(100 * x).diagonal(dim1=-2, dim2=-1) > 0.99).double().mean() > 0.5


def test_one_head_of_full_width_has_no_way_back() -> None:
    assert isinstance(MSSA(8, 1).to_out, nn.Identity)
    assert isinstance(MSSA(8, 1, head_dim=4).to_out, nn.Sequential)
    assert sum(p.numel() for p in MSSA(8, 1).parameters()) == 64


def test_tokens_may_come_in_any_order() -> None:
    torch.manual_seed(0)
    layer, x = MSSA(12, 3).double(), gaussian(24, 2, 7, 12)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    layer, x = MSSA(12, 3, dropout=0.5), gaussian(25, 2, 7, 12).float()
    assert (layer(x) == 0).float().mean() > 0.3
    assert not (layer.eval()(x) == 0).any()
    tied = MSSA(12, 3, dropout=0.5, tie_output=True)
    assert (tied(x) == 0).float().mean() > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide dim, got dim=12, num_heads=5"),
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"head_dim": 0}, "head_dim must be positive"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\]"),
    ],
)
def test_attention_refuses_bad_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSSA(12, **{"num_heads": 3, **options})


# --- sparsification -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_layer_is_one_derived_step_from_its_input(nonnegative: bool) -> None:
    torch.manual_seed(0)
    layer, y = ISTA(6, 0.2, 0.3, nonnegative).double(), gaussian(30, 2, 5, 6)
    torch.testing.assert_close(layer(y), ista_step(y, y, layer.weight, 0.2, 0.3, nonnegative=nonnegative))
    assert (layer(y) >= 0).all() == nonnegative


def test_a_large_threshold_leaves_nothing() -> None:
    layer = ISTA(6, 0.1, 1e4)
    assert not layer(gaussian(31, 2, 5, 6).float()).any()


def test_a_dictionary_starts_kaiming_uniform() -> None:
    torch.manual_seed(0)
    weight = ISTA(256).weight.detach()
    bound = math.sqrt(6 / 256)
    assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_overcomplete_layer_is_steps_from_zero_and_a_way_back(decoupled: bool) -> None:
    torch.manual_seed(0)
    layer, y = OvercompleteISTA(6, 3, 0.05, 0.1, steps=3, decoupled=decoupled).double(), gaussian(32, 2, 5, 6)
    code = torch.zeros(2, 5, 18, dtype=y.dtype)
    for _ in range(3):
        code = ista_step(code, y, layer.weight, 0.05, 0.1)
    torch.testing.assert_close(layer.code(y), code)
    back = layer.output_weight if decoupled else layer.weight
    torch.testing.assert_close(layer(y), code @ back.T)
    assert len(list(layer.parameters())) == 1 + decoupled


@pytest.mark.parametrize("kind", [ISTA, OvercompleteISTA])
def test_sparsification_refuses_bad_numbers_and_tokens(kind: Any) -> None:
    with pytest.raises(ValueError, match="step_size must be positive"):
        kind(6, step_size=0.0)
    with pytest.raises(ValueError, match="lambd must be at least 0"):
        kind(6, lambd=-0.1)
    with pytest.raises(ValueError, match=r"y must be a tensor of shape \(..., 6\), got \(2, 5\)"):
        kind(6)(torch.ones(2, 5))
    with pytest.raises(TypeError, match="y must have the module's dtype"):
        kind(6)(torch.ones(2, 6).double())


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_a_block_norms_twice_and_skips_once() -> None:
    torch.manual_seed(0)
    block, x = CRATEBlock(12, 3).double(), gaussian(40, 2, 7, 12)
    compress, sparsify = block
    half = x + compress.fn(compress.norm(x))
    torch.testing.assert_close(block(x), sparsify.fn(sparsify.norm(half)))
    assert (block(x) >= 0).all()
    # What leaves does not hold the length of what came: the norm in front of ISTA takes it away.
    assert compress.norm.eps == sparsify.norm.eps == 1e-5


def test_a_block_of_the_successor_skips_twice() -> None:
    torch.manual_seed(0)
    block, x = CRATEBlock(12, 3, skip=True, expansion=4).double(), gaussian(41, 2, 7, 12)
    compress, sparsify = block
    half = x + compress.fn(compress.norm(x))
    assert isinstance(sparsify.fn, OvercompleteISTA)
    torch.testing.assert_close(block(x), half + sparsify.fn(sparsify.norm(half)))


def test_a_block_has_a_quarter_of_the_weights_of_a_transformer_s() -> None:
    weights = sum(p.numel() for p in CRATEBlock(64, 4).parameters() if p.dim() == 2)
    assert weights == 3 * 64**2
    assert 4 * weights == 12 * 64**2


def test_options_reach_the_parts_of_a_block() -> None:
    block = CRATEBlock(12, 3, 6, dropout=0.2, step_size=0.3, lambd=0.4, nonnegative=False, tie_output=True)
    attention, ista = block[0].fn, block[1].fn
    assert (attention.head_dim, attention.dropout, attention.tie_output) == (6, 0.2, True)
    assert (ista.step_size, ista.lambd, ista.nonnegative) == (0.3, 0.4, False)
    with pytest.raises(ValueError, match="nonnegative=False needs expansion=None"):
        CRATEBlock(12, 3, nonnegative=False, expansion=4)
