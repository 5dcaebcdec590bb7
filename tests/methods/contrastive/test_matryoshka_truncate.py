"""Prefixes of tensors and arrays, the encoder with a size, and the scikit-learn transformer."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from headgate.methods.contrastive.matryoshka import MatryoshkaEncoder, MatryoshkaTruncate, truncate


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_truncate_normalises_after_slicing() -> None:
    z = torch.tensor([[3.0, 4.0, 12.0, 0.0]])
    torch.testing.assert_close(truncate(z, 2), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(truncate(z, 2, normalize=False), torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(truncate(z, 3), torch.tensor([[3.0, 4.0, 12.0]]) / 13)


def test_truncate_of_a_truncated_embedding_is_the_shorter_truncation() -> None:
    z = normal(2, 3, 16)
    torch.testing.assert_close(truncate(truncate(z, 8), 4), truncate(z, 4))
    torch.testing.assert_close(truncate(z, 16), nn.functional.normalize(z, dim=-1))


def test_truncate_does_the_same_to_arrays_and_tensors_of_every_floating_dtype() -> None:
    z = normal(5, 8)
    for dtype in (torch.float64, torch.float32, torch.float16):
        tensor = truncate(z.to(dtype), 4)
        array = truncate(z.to(dtype).numpy(), 4)
        assert isinstance(array, np.ndarray)
        assert array.dtype == tensor.numpy().dtype
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-3 if dtype == torch.float16 else 1e-6)
    assert truncate(z.bfloat16(), 4).dtype == torch.bfloat16


def test_truncate_leaves_a_zero_slice_zero() -> None:
    z = normal(2, 8)
    z[0, :4] = 0
    assert (truncate(z, 4)[0] == 0).all()
    assert (truncate(z.numpy(), 4)[0] == 0).all()
    torch.testing.assert_close(truncate(z, 4)[1].norm(), torch.tensor(1.0))


def test_truncate_does_not_change_its_argument() -> None:
    z = normal(2, 8)
    before = z.clone()
    truncate(z, 4)
    truncate(z.numpy(), 4)
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("z", "dim", "error", "message"),
    [
        (normal(2, 8), 0, ValueError, r"dim must lie in \[1, 8\]"),
        (normal(2, 8), 9, ValueError, r"dim must lie in \[1, 8\]"),
        (normal(2, 8), 4.0, TypeError, "dim must be an integer, got float"),
        (normal(2, 8).long(), 4, TypeError, "z must be floating"),
        (np.zeros((2, 8), dtype=np.int64), 4, TypeError, "z must be floating"),
        ([[1.0, 2.0]], 1, TypeError, "tensor or a NumPy array, got list"),
        (torch.tensor(1.0), 1, ValueError, "at least one axis"),
        (torch.tensor([[float("nan"), 1.0]]), 1, ValueError, "no NaN"),
        (np.array([[np.nan, 1.0]]), 1, ValueError, "no NaN"),
    ],
)
def test_truncate_refuses(z: Any, dim: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        truncate(z, dim)


def test_truncate_compiles_and_exports_without_a_graph_break() -> None:
    class Truncate(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return truncate(z, 4)

    z = normal(3, 8)
    compiled = torch.compile(Truncate(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), truncate(z, 4))
    torch.testing.assert_close(torch.export.export(Truncate(), (z,)).module()(z), truncate(z, 4))


def test_encoder_returns_the_size_that_is_set() -> None:
    encoder = nn.Linear(3, 16)
    model = MatryoshkaEncoder(encoder, (4, 8, 16))
    x = normal(5, 3)
    torch.testing.assert_close(model(x), truncate(encoder(x), 16))
    torch.testing.assert_close(model(x, dim=4), truncate(encoder(x), 4))
    model.dim = 6  # sizes between the trained ones work, too
    torch.testing.assert_close(model(x), truncate(encoder(x), 6))
    plain = MatryoshkaEncoder(encoder, (4, 8, 16), dim=8, normalize=False)
    torch.testing.assert_close(plain(x), encoder(x)[:, :8])


def test_encoder_hands_its_arguments_on_and_keeps_gradients() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 8)

        def forward(self, tokens: torch.Tensor, *, scale: float) -> torch.Tensor:
            return self.linear(tokens) * scale

    model = MatryoshkaEncoder(Encoder(), (4, 8), dim=4, normalize=False)
    model(normal(2, 5, 3), scale=2.0).sum().backward()
    gradient = model.encoder.linear.weight.grad
    assert gradient is not None
    assert (gradient[:4] != 0).all()
    assert (gradient[4:] == 0).all()


def test_encoder_refuses_sizes_it_cannot_give_and_outputs_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"dim must lie in \[1, 8\]"):
        MatryoshkaEncoder(nn.Linear(3, 8), (4, 8), dim=9)
    model = MatryoshkaEncoder(nn.Linear(3, 8), (4, 8))
    with pytest.raises(ValueError, match=r"dim must lie in \[1, 8\]"):
        model.dim = 0
    with pytest.raises(ValueError, match=r"dim must lie in \[1, 8\]"):
        model(normal(2, 3), dim=16)
    with pytest.raises(ValueError, match="embeddings of size 8"):
        MatryoshkaEncoder(nn.Linear(3, 7), (4, 8))(normal(2, 3))
    with pytest.raises(TypeError, match="floating tensor, got dict"):
        MatryoshkaEncoder(_Mapping(), (4, 8))(normal(2, 3))


class _Mapping(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": x}


@pytest.mark.parametrize(
    "estimator", [MatryoshkaTruncate(), MatryoshkaTruncate(2), MatryoshkaTruncate(normalize=False)]
)
def test_transformer_passes_the_checks_of_scikit_learn(estimator: MatryoshkaTruncate) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks that do not apply are skipped with a warning
        check_estimator(estimator)


def test_transformer_gives_unit_prefixes_with_the_names_of_the_columns_kept() -> None:
    z = normal(6, 8).numpy()
    transformer = MatryoshkaTruncate(3).fit(z)
    np.testing.assert_array_equal(transformer.transform(z), truncate(z, 3))
    assert transformer.get_feature_names_out().tolist() == ["x0", "x1", "x2"]
    assert transformer.set_params(normalize=False).fit_transform(z).tolist() == z[:, :3].tolist()


def test_transformer_works_in_a_pipeline() -> None:
    z = np.concatenate([normal(20, 8).numpy() * 0.1 + np.eye(8)[0], normal(20, 8).numpy() * 0.1 - np.eye(8)[0]])
    y = np.repeat([0, 1], 20)
    assert make_pipeline(MatryoshkaTruncate(2), KNeighborsClassifier(1)).fit(z, y).score(z, y) == 1


@pytest.mark.parametrize("dim", [0, 9, 2.0, "4"])
def test_transformer_refuses_a_size_that_the_data_do_not_have(dim: Any) -> None:
    with pytest.raises(ValueError, match=r"dim must be an integer in \[1, n_features=8\]"):
        MatryoshkaTruncate(dim).fit(normal(4, 8).numpy())


def test_transformer_refuses_nan() -> None:
    z = normal(4, 8).numpy().copy()
    z[1, 7] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        MatryoshkaTruncate(4).fit(z)
