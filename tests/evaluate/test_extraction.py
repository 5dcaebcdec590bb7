from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from headgate.evaluate import Features, extract, extract_layers

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 3


class Net(nn.Module):
    """Normalisation and dropout tell eval mode from training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Tokens(nn.Module):
    """Hands out tokens, maps, tuples or other things."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


class Reader(nn.Module):
    """Takes text."""

    def forward(self, texts: str) -> Tensor:
        return torch.tensor([[float(len(text))] for text in texts.split()])


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.train()
    net(X)
    net.body[1].eval()
    return net


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 4, **options})


def test_features_are_the_eval_mode_output_in_the_order_of_the_data(model: Net) -> None:
    found = extract(model, loader())
    with torch.no_grad():
        expected = model.eval()(X)
    np.testing.assert_allclose(found.X, expected.numpy(), rtol=1e-6)
    assert found.X.dtype == np.float32
    assert found.y is not None
    assert found.y.tolist() == Y.tolist()
    assert found.ids.tolist() == list(range(10))


def test_every_module_is_in_its_old_mode_afterwards_even_after_an_error(model: Net) -> None:
    before = {name: module.training for name, module in model.named_modules()}
    assert before["body.1"] is False
    assert before[""] is True
    extract(model, loader())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="layer must name a submodule"):
        extract(model, loader(), "nowhere")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not model.body[0]._forward_hooks


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_features_do_not_depend_on_the_batch_size(model: Net, batch_size: int) -> None:
    expected = extract(model, loader(), "body.0").X
    np.testing.assert_allclose(extract(model, loader(batch_size=batch_size), "body.0").X, expected, rtol=1e-5)


def test_a_layer_is_a_name_or_a_callable(model: Net) -> None:
    by_name = extract(model, loader(), "body")
    by_call = extract(model, loader(), lambda net, x: net.body(x))
    assert (by_name.X == by_call.X).all()
    assert by_name.X.shape == (10, 6)
    assert not model.body._forward_hooks


def test_the_record_tells_how_the_features_came_about(model: Net) -> None:
    class Data(TensorDataset):
        transform = "Resize(221)"

    meta = extract(model, DataLoader(Data(X, Y), batch_size=5), "body", normalize=True, dtype=np.float64).meta
    assert meta == {
        "model": "Net",
        "layer": "body",
        "pool": "none",
        "normalize": True,
        "preprocessing": "'Resize(221)'",
        "dtype": "float64",
    }
    assert extract(model, loader(), preprocessing="centre crop").meta["preprocessing"] == "centre crop"
    assert extract(model, loader()).meta["layer"] == "output"


@pytest.mark.parametrize(
    ("output", "pool", "expected", "recorded"),
    [
        (lambda x: x, "auto", X, "none"),
        (lambda x: x, "mean", X, "none"),
        (lambda x: torch.stack([x, 3 * x], dim=1), "auto", 2 * X, "mean"),
        (lambda x: torch.stack([x, 3 * x], dim=1), "cls", X, "cls"),
        (lambda x: torch.stack([x, 3 * x], dim=1), "none", torch.stack([X, 3 * X], dim=1), "none"),
        (lambda x: torch.stack([x, 3 * x], dim=2)[..., None], "auto", 2 * X, "mean"),
        (lambda x: torch.stack([x, 3 * x], dim=2)[:, :, None, :, None], "mean", 2 * X, "mean"),
        (lambda x: (x, "more"), "auto", X, "none"),
    ],
)
def test_tokens_and_maps_are_pooled_as_asked(output: Any, pool: Any, expected: Tensor, recorded: str) -> None:
    found = extract(Tokens(output), loader(), pool=pool)
    np.testing.assert_allclose(found.X, expected.numpy(), rtol=1e-6)
    assert found.meta["pool"] == recorded


def test_half_precision_outputs_become_single_precision() -> None:
    found = extract(Tokens(lambda x: x.bfloat16()), loader())
    assert found.X.dtype == np.float32
    assert (X.bfloat16().float().numpy() == found.X).all()


def test_normalised_features_have_unit_length_and_a_dead_one_names_layer_and_row() -> None:
    found = extract(Tokens(lambda x: x), loader(), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(found.X, axis=1), 1, rtol=1e-6)
    model = nn.Sequential(Tokens(lambda x: x * (x != X[6])))
    with pytest.raises(
        ValueError, match="features of layer '0' must hold no zero vector for the cosine, got one in row 6"
    ):
        extract(model, loader(), "0", normalize=True)


def test_a_feature_that_is_not_finite_names_layer_and_row() -> None:
    model = Tokens(lambda x: torch.where(x == X[7], torch.nan, x))
    with pytest.raises(ValueError, match="features of layer 'output' must be finite, got NaN in row 7"):
        extract(model, loader())


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"sampler": torch.utils.data.WeightedRandomSampler(torch.ones(10), 10)},
        {"batch_size": 1, "batch_sampler": None, "sampler": torch.utils.data.SubsetRandomSampler(range(10))},
    ],
)
def test_a_shuffled_loader_without_ids_is_refused(model: Net, options: dict) -> None:
    with pytest.raises(ValueError, match="keep the order of its data set or hand out ids"):
        extract(model, loader(**options))


def test_a_custom_batch_sampler_without_ids_is_refused(model: Net) -> None:
    with pytest.raises(ValueError, match="shuffled loader"):
        extract(model, DataLoader(TensorDataset(X, Y), batch_sampler=[[3, 1], [0, 2]]))


def test_a_shuffled_loader_with_ids_is_welcome(model: Net) -> None:
    ids = torch.arange(10) + 100
    shuffled = DataLoader(TensorDataset(X, Y, ids), batch_size=3, shuffle=True)
    found = extract(model, shuffled)
    straight = extract(model, loader())
    order = np.argsort(found.ids)
    assert found.ids[order].tolist() == ids.tolist()
    np.testing.assert_allclose(found.X[order], straight.X, rtol=1e-5, atol=1e-6)
    assert found.y is not None
    assert found.y[order].tolist() == Y.tolist()


def test_plain_iterables_streams_and_mappings_are_read(model: Net) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(X, Y, strict=True))

    expected = extract(model, loader()).X
    tensors = [X[:5], X[5:]]
    mappings = [{"x": X[:5], "y": Y[:5], "ids": [9, 8, 7, 6, 5]}, {"x": X[5:], "y": Y[5:], "ids": [4, 3, 2, 1, 0]}]
    for batches in (tensors, [(x,) for x in tensors], mappings, DataLoader(Stream(), batch_size=4)):
        np.testing.assert_allclose(extract(model, batches).X, expected, rtol=1e-5, atol=1e-6)
    assert extract(model, tensors).y is None
    assert extract(model, mappings).ids.tolist() == list(range(10))[::-1]


def test_a_model_of_several_inputs_gets_them_by_position_or_name() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    expected = (X - 2 * X).numpy()
    assert (expected == extract(Two(), [((X, 2 * X), Y)]).X).all()
    assert (expected == extract(Two(), [({"b": 2 * X, "a": X}, Y)]).X).all()


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "at least one batch"),
        ([(X, Y), (X,)], ValueError, "y must come with every batch or with none, got a change at batch 1"),
        ([(X, Y[:3])], ValueError, "y must have one entry per row: expected 10"),
        ([(X, Y, torch.zeros(10, dtype=torch.long))], ValueError, "ids must be unique"),
        ([(X, Y, torch.zeros(10))], TypeError, "ids must hold integers"),
        (["text"], TypeError, "loader must give tensors"),
        ([{"image": X}], TypeError, "mappings with 'x'"),
    ],
)
def test_batches_that_cannot_be_read_are_refused(batches: list, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        extract(Tokens(lambda x: x), batches)


@pytest.mark.parametrize(
    ("layer", "pool", "error", "match"),
    [
        ("bodi", "auto", ValueError, "got 'bodi'; near it: body"),
        (None, "max", ValueError, "pool must be one of"),
        (None, "cls", ValueError, "pool='cls' needs features of layer 'output'"),
        (lambda net, x: "features", "auto", TypeError, "must give a tensor, got str"),
        (lambda net, x: x.sum(), "auto", ValueError, "shape"),
    ],
)
def test_layers_that_give_nothing_to_pool_are_refused(
    model: Net, layer: Any, pool: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        extract(model, loader(), layer, pool)


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.activation(x) - 1)

    with pytest.raises(ValueError, match="must run once per batch, got 'activation' run 2 times"):
        extract(Shared(), loader(), "activation")


def test_a_store_holds_the_features_in_half_precision(model: Net, tmp_path: Path) -> None:
    stored = extract(model, loader(), "body.0", store=tmp_path / "f.safetensors")
    expected = extract(model, loader(), "body.0")
    assert isinstance(stored.X, np.memmap)
    assert (expected.X.astype(np.float16) == stored.X).all()
    assert stored.y is not None
    assert stored.y.tolist() == Y.tolist()
    assert stored.meta == {**expected.meta, "dtype": "float16"}
    assert (Features.open(tmp_path / "f.safetensors").X == stored.X).all()


def test_a_store_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 7"):
        extract(Tokens(lambda x: torch.where(x == X[7], torch.nan, x)), loader(), store=tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_feature_that_half_precision_cannot_hold_is_refused_and_the_mode_restored(model: Net, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"X in float16 .* in row 0"):
        extract(model, loader(), lambda net, x: net(x) * 1e9, store=tmp_path / "f")
    assert model.training
    assert list(tmp_path.iterdir()) == []


def test_several_layers_take_one_pass(model: Net) -> None:
    class Counting(Dataset):
        reads = 0

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            Counting.reads += 1
            return X[index], Y[index]

    found = extract_layers(model, DataLoader(Counting(), batch_size=4), ["body.0", "head"])
    assert Counting.reads == 10
    assert list(found) == ["body.0", "head"]
    for name in found:
        assert (found[name].X == extract(model, loader(), name).X).all()
        assert found[name].meta["layer"] == name
    named = extract_layers(model, loader(), {"input": lambda net, x: x, "output": None})
    np.testing.assert_array_equal(named["input"].X, X.numpy())
    with pytest.raises(ValueError, match="at least one layer"):
        extract_layers(model, loader(), [])


def test_no_gradient_is_recorded(model: Net) -> None:
    extract(model, loader())
    assert all(parameter.grad is None for parameter in model.parameters())
    seen: list[bool] = []
    extract(Tokens(lambda x: (seen.append(torch.is_grad_enabled()), x)[1]), loader())
    assert seen == [False] * 3


def test_other_arguments_that_cannot_be_are_refused(model: Net) -> None:
    for dtype in (torch.float32, np.int64, "float32"):
        with pytest.raises(TypeError, match="dtype must be a floating NumPy type"):
            extract(model, loader(), dtype=dtype)
    tokens = Tokens(lambda x: torch.stack([x, x], dim=1))
    with pytest.raises(ValueError, match="normalize=True needs features of layer 'output' of shape"):
        extract(tokens, loader(), pool="none", normalize=True)


def test_inputs_that_are_no_tensors_reach_the_model_as_they_are() -> None:
    found = (
        extract(Tokens(lambda texts: torch.tensor([[float(len(text))] for text in texts["raw"].split()])), [])
        if False
        else extract(Reader(), [({"texts": "a bb ccc"}, [0, 1, 0])])
    )
    assert found.X.tolist() == [[1.0], [2.0], [3.0]]
