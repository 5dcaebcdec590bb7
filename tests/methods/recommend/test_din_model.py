"""The ranking model: what goes into its tower, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headgate import DIN, Field, MiniBatchAwareL2
from headgate.errors import DataError

FIELDS = {"item": Field(4, vocabulary=20), "price": Field(2), "age": Field(3, vocabulary=5), "hour": Field(1)}
HISTORY, TARGET = ["items_before", "prices_before"], ["item", "price"]


def build(**options: Any) -> DIN:
    torch.manual_seed(0)
    return DIN(FIELDS, HISTORY, TARGET, (8, 6), **{"attention": (7,), "embedding_std": 0.5, **options})


def batch(candidates: tuple[int, ...] = (), size: int = 6, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "item": torch.randint(20, (size, *candidates), generator=generator),
        "price": torch.randn(size, *candidates, 2, generator=generator),
        "age": torch.randint(5, (size,), generator=generator),
        "hour": torch.randn(size, 1, generator=generator),
        "items_before": torch.randint(20, (size, length), generator=generator),
        "prices_before": torch.randn(size, length, 2, generator=generator),
        "mask": torch.arange(length) < torch.randint(length + 1, (size, 1), generator=generator),
    }


@pytest.mark.parametrize("pooling", ["attention", "sum", "mean"])
def test_the_plain_model_is_a_tower_over_others_interest_and_candidate(pooling: Any) -> None:
    model, given = build(pooling=pooling, activation="relu").eval(), batch()
    table = model.tables["item"]
    goods = torch.cat([table(given["item"]), given["price"]], dim=1)
    keys = torch.cat([table(given["items_before"]), given["prices_before"]], dim=2)
    real = given["mask"][..., None]
    if pooling == "attention":
        interest = model.pool(goods, keys, given["mask"])
    else:
        interest = (keys * real).sum(dim=1)
        if pooling == "mean":
            interest = interest / real.sum(dim=1).clamp_min(1)
    hidden = torch.cat([model.tables["age"](given["age"]), given["hour"], interest, goods], dim=1)
    for layer in model.tower[::2]:
        hidden = torch.relu(layer(hidden))
    torch.testing.assert_close(model(given), model.output(hidden)[:, 0])


def test_the_published_model_normalises_projects_multiplies_and_adds_a_bias_per_item() -> None:
    options = {"interaction": True, "batch_norm": True, "project": True, "item_bias": "item"}
    model, given = build(activation="sigmoid", normalize="scaled_softmax", **options), batch()
    assert model.bias is not None
    nn.init.normal_(model.bias.weight)
    table = model.tables["item"]
    goods = torch.cat([table(given["item"]), given["price"]], dim=1)
    keys = torch.cat([table(given["items_before"]), given["prices_before"]], dim=2)

    def normal(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-3).sqrt()

    interest = model.interest(normal(model.pool(goods, keys, given["mask"])))
    others = [model.tables["age"](given["age"]), given["hour"]]
    hidden = normal(torch.cat([*others, interest, goods, interest * goods], dim=1))
    for layer in model.tower[::2]:
        hidden = torch.sigmoid(layer(hidden))
    expected = model.output(hidden)[:, 0] + model.bias.weight[given["item"], 0]
    torch.testing.assert_close(model(given), expected, atol=1e-5, rtol=1e-4)


def test_many_candidates_of_a_user_score_as_one_by_one() -> None:
    model, given = build(normalize="softmax", interaction=True, item_bias="item").eval(), batch(candidates=(4,))
    together = model(given)
    assert together.shape == (6, 4)
    for index in range(4):
        single = {**given, "item": given["item"][:, index], "price": given["price"][:, index]}
        torch.testing.assert_close(model(single), together[:, index])
    assert model.attention_weights(given).shape == (6, 4, 5)


def test_what_stands_in_padding_and_behind_it_does_not_matter() -> None:
    for mode in (True, False):
        model, given = build().train(mode), batch()
        longer = dict(given)
        longer["items_before"] = F.pad(given["items_before"].masked_fill(~given["mask"], 7), (0, 3), value=11)
        longer["prices_before"] = F.pad(given["prices_before"], (0, 0, 0, 3), value=1e3)
        longer["mask"] = F.pad(given["mask"], (0, 3), value=False)
        torch.testing.assert_close(model(longer), model(given), atol=1e-5, rtol=1e-4)


def test_attention_depends_on_the_candidate_and_fixed_pooling_cannot_be_looked_at() -> None:
    model, given = build(normalize="softmax").eval(), batch()
    given["mask"][:] = True
    weights = model.attention_weights(given)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    other = model.attention_weights({**given, "item": (given["item"] + 1) % 20})
    assert (weights - other).abs().max() > 1e-4
    with pytest.raises(TypeError, match="needs a model with pooling='attention'"):
        build(pooling="mean").attention_weights(given)


def test_table_ids_are_those_that_the_batch_looks_up() -> None:
    model, given = build(), batch()
    ids = model.table_ids(given)
    assert set(ids) == {"item", "age"}
    wanted = set(given["item"].tolist()) | set(given["items_before"][given["mask"]].tolist())
    assert set(ids["item"].tolist()) - {-1} == wanted
    assert (ids["item"] == -1).sum() == (~given["mask"]).sum()
    MiniBatchAwareL2(model.tables)(ids).backward()  # type: ignore[arg-type]
    gradient = model.tables["item"].weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert set(gradient.abs().sum(dim=1).nonzero()[:, 0].tolist()) == wanted


def test_sparse_tables_train_with_sparse_adam() -> None:
    model, given = build(sparse=True, item_bias="item"), batch()
    model(given).sum().backward()
    tables = [*model.tables.parameters(), model.bias.weight]  # type: ignore[union-attr]
    assert all(table.grad is not None and table.grad.is_sparse for table in tables)
    before = tables[0].detach().clone()
    torch.optim.SparseAdam(tables, lr=0.1).step()
    seen = torch.zeros(20, dtype=torch.bool)
    seen[given["item"]] = True
    seen[given["items_before"][given["mask"]]] = True
    changed = (tables[0] != before).any(dim=1)
    assert not changed[~seen].any()
    assert changed[given["item"]].all()


def test_fields_may_come_as_json_and_give_the_same_model() -> None:
    listed = {
        "item": {"dim": 4, "vocabulary": 20},
        "price": {"dim": 2},
        "age": {"dim": 3, "vocabulary": 5},
        "hour": {"dim": 1},
    }
    torch.manual_seed(0)
    model = DIN(json.loads(json.dumps(listed)), HISTORY, TARGET, (8, 6), attention=(7,), embedding_std=0.5)
    model.load_state_dict(build().state_dict())
    torch.testing.assert_close(model.eval()(batch()), build().eval()(batch()))


def test_dice_in_the_tower_and_another_activation_in_the_unit() -> None:
    model = build(activation="dice", attention_activation="prelu")
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert kinds.count("Dice") == 2
    assert kinds.count("PReLU") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": ["item", "brand"]}, "target must hold different names of fields"),
        ({"target": []}, "target must hold different names of fields"),
        ({"history": ["items_before"]}, "history must have one input for each of target"),
        ({"history": ["item", "prices_before"]}, "must be different names"),
        ({"item_bias": "price"}, "item_bias must name an input of target with ids, got 'price'"),
        ({"pooling": "max"}, "pooling must be 'attention', 'sum' or 'mean', got 'max'"),
        ({"mlp": ()}, "mlp must hold one positive width"),
        ({"fields": {}}, "fields must not be empty"),
        ({"fields": {**FIELDS, "forward": Field(2)}}, "identifiers that no module method has, got 'forward'"),
        ({"fields": {**FIELDS, "colour": {"size": 3}}}, r"fields\['colour'\] must have dim"),
        ({"fields": {**FIELDS, "colour": {"dim": 0}}}, "dim must be positive"),
    ],
)
def test_an_impossible_model_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIN(**{"fields": FIELDS, "history": HISTORY, "target": TARGET, **arguments})


def test_a_saved_model_comes_back_with_its_arguments_and_weights(tmp_path: Path) -> None:
    options = {"normalize": "softmax", "interaction": True, "item_bias": "item", "attention_activation": "prelu"}
    model, given = build(**options), batch()
    model(given).sum().backward()
    model.eval().save_pretrained(tmp_path)
    loaded = DIN.from_pretrained(tmp_path)
    assert (loaded.fields, loaded.history, loaded.interaction) == (model.fields, model.history, True)
    torch.testing.assert_close(loaded(given), model(given), rtol=0, atol=0)
    assert not loaded.training
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"must hold model\.safetensors"):
        DIN.from_pretrained(tmp_path)


def test_a_model_with_a_function_for_an_activation_is_not_saved(tmp_path: Path) -> None:
    model = build(activation=lambda width: nn.Tanh())
    with pytest.raises(ValueError, match="give the activation by name"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_padding_left_out_gives_what_all_of_the_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"normalize": "softmax", "activation": "prelu"}, {"pooling": "mean"}):
        results = []
        for looks in (True, False):
            for name in ("activation_unit", "model"):
                module = importlib.import_module(f"headgate.methods.recommend.din.{name}")
                if not looks:
                    monkeypatch.setattr(module, "real_places", lambda mask: None)
            model, given = build(**options), batch(candidates=(3,))
            given["mask"][0] = False
            logits = model(given)
            (logits * torch.arange(18).view(6, 3)).sum().backward()
            results.append([logits.detach(), *(weight.grad for weight in model.parameters()), *model.buffers()])
        monkeypatch.undo()
        for packed, whole in zip(*results, strict=True):
            torch.testing.assert_close(packed, whole, atol=1e-4, rtol=1e-4)
