"""Features of a frozen backbone in files, exits behind nodes of a graph, and heads that are saved without their backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from headgate.errors import DataError
from headgate.methods.routing.jei_dnn import (
    EarlyExit,
    ExitHeads,
    JEITrainer,
    T2TViT,
    add_exit_points,
    collect_features,
    keep_features,
    open_features,
)

CLASSES = 3


class Residual(nn.Module):
    """Blocks whose outputs are sums that no submodule makes."""

    def __init__(self, depth: int = 3, dim: int = 6) -> None:
        super().__init__()
        self.num_features, self.num_classes = dim, CLASSES
        self.branches = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + self.drop(branch(x).tanh())
        result: Tensor = self.head(x)
        return result


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual()


def inputs(count: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def network() -> EarlyExit:
    return EarlyExit(residual(), blocks="branches")


# Features in files


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_kept_features_are_those_of_one_pass_in_order(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    model, (x, target) = network().train(), inputs()
    kept = keep_features(model, DataLoader(TensorDataset(x, target), batch_size=7), tmp_path / "train", dtype=dtype)
    assert model.backbone.training
    features, logits = collect_features(model, x)
    assert (len(kept), kept.features.dtype, kept.exit_names) == (50, dtype, ("branches.0", "branches.1"))
    for found, expected in zip(kept.tensors(), (features, logits, target), strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    again = open_features(tmp_path / "train")
    assert torch.equal(again.features, kept.features)
    assert torch.equal(again.target, target)


def test_training_from_files_is_training_from_memory(tmp_path: Path) -> None:
    model, (x, target) = network(), inputs()
    kept = keep_features(model, [(x[:30], target[:30]), (x[30:], target[30:])], tmp_path / "train")
    results = []
    for train in (kept.batches(16, seed=5), kept.tensors()):
        torch.manual_seed(1)
        exits = ExitHeads(6, CLASSES, 2)
        trainer = JEITrainer(
            exits, 0.2, costs=model.costs, epochs=2, warmup_epochs=1, batch_size=16, switch_every=1, seed=5
        )
        trainer.fit(train, kept.tensors())
        results.append(exits.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_what_is_written_to_mapped_features_does_not_reach_the_files(tmp_path: Path) -> None:
    kept = keep_features(network(), [inputs()], tmp_path / "train")
    before = kept.features[0].clone()
    kept.features[0].zero_()
    assert torch.equal(open_features(tmp_path / "train").features[0], before)
    assert before.abs().sum() > 0


def test_a_failed_pass_leaves_nothing(tmp_path: Path) -> None:
    x, target = inputs()
    with pytest.raises(ValueError, match=r"target must have shape \(50,\), one per input, got \(49,\)"):
        keep_features(network(), [(x, target), (x, target[1:])], tmp_path / "train")
    with pytest.raises(ValueError, match="batches must hold at least one input"):
        keep_features(network(), [], tmp_path / "train")
    with pytest.raises(TypeError, match="target"):
        keep_features(network(), [(x, target.float())], tmp_path / "train")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten_and_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder must not exist yet"):
        keep_features(network(), [inputs()], tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        keep_features(network(), [inputs()], tmp_path / "train", dtype=torch.float64)
    assert not (tmp_path / "train").exists()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    keep_features(network(), [inputs()], folder)
    whole = (folder / "logits.bin").read_bytes()
    (folder / "logits.bin").write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"logits\.bin must hold 600 bytes for \(50, 3\) of torch\.float32, found 596"):
        open_features(folder)
    (folder / "logits.bin").write_bytes(whole)
    facts = json.loads((folder / "kept.json").read_text())
    (folder / "kept.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(DataError, match="format 1, found 2"):
        open_features(folder)
    (folder / "kept.json").write_text("{}")
    with pytest.raises(DataError, match="holds no kept features"):
        open_features(folder)
    with pytest.raises(DataError, match="holds no kept features"):
        open_features(tmp_path / "nowhere")


# Exits behind nodes of a graph


def test_an_exit_stands_behind_a_sum_that_no_submodule_makes() -> None:
    plain, (x, _) = residual().eval(), inputs()
    model = EarlyExit(add_exit_points(plain, ["add", "add_1"]), exits=["exit_0", "exit_1"]).eval()
    outputs = model(x)
    first = x + plain.branches[0](x).tanh()
    torch.testing.assert_close(outputs.features[:, 0], first)
    torch.testing.assert_close(outputs.features[:, 1], first + plain.branches[1](first).tanh())
    torch.testing.assert_close(outputs.logits[-1], plain(x))
    assert model.costs.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


def test_stopping_at_a_node_changes_no_answer_and_saves_the_work_behind_it() -> None:
    plain, (x, _) = residual().eval(), inputs()
    model = EarlyExit(add_exit_points(plain, ["add", "add_1"]), exits=["exit_0", "exit_1"]).eval()
    for gate in model.exits.gates:
        nn.init.zeros_(gate.linear.weight)  # type: ignore[union-attr]
        nn.init.constant_(gate.linear.weight[:, :1], 9.0)  # type: ignore[union-attr,index]
        nn.init.constant_(gate.linear.bias, 0.0)  # type: ignore[union-attr]
    for head in model.exits.heads:
        nn.init.normal_(head.weight, std=2.0)  # type: ignore[arg-type]
    with torch.no_grad():
        for place, gate in enumerate(model.exits.gates):
            gate.linear.bias.sub_(model(x).gate_logits[:, place].quantile(0.6))  # type: ignore[union-attr]
    rows: list[int] = []
    plain.branches[2].register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    stopped, whole = model.infer(x), model.infer(x, compact=False)
    assert torch.equal(stopped.exit_index, whole.exit_index)
    assert len(stopped.exit_index.unique()) == 3
    torch.testing.assert_close(stopped.logits, whole.logits)
    assert rows == [int((whole.exit_index == 2).sum()), 50]


def test_a_graph_with_points_shares_weights_and_follows_the_mode() -> None:
    plain = residual()
    traced = add_exit_points(plain, ["add"])
    assert traced.get_parameter("branches.0.weight") is plain.branches[0].weight
    assert traced.training
    assert traced.num_features == 6
    more = add_exit_points(fx.symbolic_trace(plain.eval()), ["add_2"])
    x, _ = inputs()
    torch.testing.assert_close(more(x), plain(x))
    assert not more.training


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([], "nodes must be names from"),
        (["sum"], r"nodes must be names from .*'add'.*, got \['sum'\]"),
        (["output"], "nodes must be names from"),
        (["add_1", "add"], "nodes must come in the order in which they run"),
        (["add", "add"], "nodes must come in the order in which they run, each once"),
    ],
)
def test_impossible_points_are_refused(nodes: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        add_exit_points(residual(), nodes)


def test_names_of_points_must_be_free() -> None:
    with pytest.raises(ValueError, match=r"no submodules \['exit_0'\]"):
        add_exit_points(add_exit_points(residual(), ["add"]), ["add_1"])
    with pytest.raises(TypeError, match="model must be a module, got str"):
        add_exit_points("model", ["add"])  # type: ignore[arg-type]


# Saved


def test_heads_and_gates_come_back_without_their_backbone(tmp_path: Path) -> None:
    model, (x, _) = network().eval(), inputs()
    expected = model(x)
    model.exits.save_pretrained(tmp_path)
    other = EarlyExit(residual(), blocks="branches").eval()
    other.exits = ExitHeads.from_pretrained(tmp_path)
    torch.testing.assert_close(other(x).logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(other(x).exit_prob, expected.exit_prob, rtol=0, atol=0)


def test_heads_of_ones_own_are_not_saved(tmp_path: Path) -> None:
    exits = ExitHeads(6, CLASSES, 2, head=lambda dim, classes: nn.Sequential(nn.Linear(dim, classes)))
    with pytest.raises(ValueError, match="cannot be saved so"):
        exits.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_saved_t2t_vit_comes_back_with_a_classifier_of_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = T2TViT(8, 2, 2, img_size=32, num_classes=5, token_dim=6).eval()
    vit.reset_classifier(4)
    vit.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(T2TViT.from_pretrained(tmp_path)(images), vit(images), rtol=0, atol=0)
