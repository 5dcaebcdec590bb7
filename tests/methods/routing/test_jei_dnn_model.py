"""Exits on backbones: the same answers with and without stopping, and less work with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from headgate.methods.routing.jei_dnn import EarlyExit, ExitHeads, UncertaintyGate, exit_index, profile_costs
from headgate.nn import VisionTransformer

CLASSES = 5


def vision(depth: int = 4) -> VisionTransformer:
    return VisionTransformer(16, depth, 2, img_size=8, patch_size=4, in_chans=2, num_classes=CLASSES)


def images(count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def spread(model: EarlyExit, *args: Any, **kwargs: Any) -> EarlyExit:
    """Give the model heads that tell inputs apart and gates that let about a third go at each exit."""
    torch.manual_seed(1)
    model.eval()
    for head in model.exits.heads:
        nn.init.normal_(head.weight, std=2.0)
    with torch.no_grad():
        for place, gate in enumerate(model.exits.gates):
            gate.linear.weight.copy_(torch.tensor([[9.0, 0.0, 0.0, 0.0]]))
            gate.linear.bias.zero_()
            gate_logits = model(*args, **kwargs).gate_logits[:, place]
            gate.linear.bias.sub_(gate_logits.quantile(0.65))
    return model


class Recorder:
    """How many rows each block was asked for."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.rows: list[int] = []
        for block in blocks:
            block.register_forward_pre_hook(lambda _block, inputs: self.rows.append(inputs[0].shape[0]))


@pytest.fixture
def model() -> EarlyExit:
    torch.manual_seed(0)
    return spread(EarlyExit(vision(), norm="norm"), images())


def test_all_exits_say_what_heads_and_gates_say_of_the_normed_class_token(model: EarlyExit) -> None:
    outputs = model(images())
    backbone = model.backbone
    assert isinstance(backbone, VisionTransformer)
    x = backbone._embed(images())
    for place, block in enumerate(backbone.blocks):
        x = block(x)
        if place < 3:
            z = backbone.norm(x)[:, 0]
            torch.testing.assert_close(outputs.features[:, place], z)
            torch.testing.assert_close(outputs.logits[place], model.exits.heads[place](z))
    torch.testing.assert_close(outputs.logits[-1], backbone(images()))
    assert outputs.logits.shape == (4, 40, CLASSES)
    assert outputs.exit_prob.shape == (40, 4)


def test_stopping_changes_no_answer(model: EarlyExit) -> None:
    stopped, whole = model.infer(images()), model.infer(images(), compact=False)
    assert len(stopped.exit_index.unique()) >= 3, "the test needs inputs that leave at different exits"
    assert torch.equal(stopped.exit_index, whole.exit_index)
    torch.testing.assert_close(stopped.logits, whole.logits)
    torch.testing.assert_close(stopped.cost, whole.cost)
    outputs = model(images())
    assert torch.equal(whole.exit_index, exit_index(outputs.exit_prob))
    assert torch.equal(stopped.cost, model.costs[stopped.exit_index])


def test_blocks_are_asked_only_for_inputs_that_are_left(model: EarlyExit) -> None:
    recorder = Recorder(model.backbone.blocks)  # type: ignore[arg-type]
    answer = model.infer(images())
    left = [int((answer.exit_index >= exit).sum()) for exit in range(4)]
    assert recorder.rows == left
    assert left[0] == 40 > left[1] > left[2]


def test_the_products_made_are_those_that_the_answers_cost(model: EarlyExit) -> None:
    profile = profile_costs(model, images(1))
    model.set_costs(profile.normalized)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer = model.infer(images())
    # Gates count 9C + 6 operations in the profile; the counter sees the 4 products of their linear layer.
    gates = 9 * CLASSES + 6 - 4
    passed = torch.clamp(answer.exit_index + 1, max=3).sum().item()
    expected = float(answer.cost.double().sum() * profile.multiply_adds[-1]) - gates * passed
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=1e-5)
    assert expected < 0.9 * 40 * float(profile.multiply_adds[-1])


def test_a_pass_ends_when_nobody_is_left(model: EarlyExit) -> None:
    for gate in model.exits.gates:
        nn.init.constant_(gate.linear.bias, 100.0)
    recorder = Recorder(model.backbone.blocks)  # type: ignore[arg-type]
    answer = model.infer(images())
    assert recorder.rows == [40]
    assert answer.exit_index.tolist() == [0] * 40
    torch.testing.assert_close(answer.logits, model(images()).logits[0])


def test_nobody_leaves_where_no_gate_fires(model: EarlyExit) -> None:
    for gate in model.exits.gates:
        nn.init.constant_(gate.linear.bias, -100.0)
    answer = model.infer(images())
    assert answer.exit_index.tolist() == [3] * 40
    assert answer.cost.tolist() == [1.0] * 40
    torch.testing.assert_close(answer.logits, model.backbone(images()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_a_transformers_model_lose_the_rows_that_leave(attention: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        attn_implementation=attention,
    )
    tokens = torch.randint(50, (24, 7))
    mask = (torch.arange(7) < torch.randint(2, 8, (24, 1))).long()
    model = EarlyExit(BertForSequenceClassification(config))
    assert (model.exits.dim, model.exits.num_classes, model.num_gates) == (16, 3, 3)
    spread(model, input_ids=tokens, attention_mask=mask)
    stopped = model.infer(input_ids=tokens, attention_mask=mask)
    whole = model.infer(input_ids=tokens, attention_mask=mask, compact=False)
    assert len(stopped.exit_index.unique()) >= 3
    assert torch.equal(stopped.exit_index, whole.exit_index)
    torch.testing.assert_close(stopped.logits, whole.logits)


def test_a_transformers_vision_model_takes_exits_too() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=2,
        num_labels=CLASSES,
    )
    model = EarlyExit(ViTForImageClassification(config), norm="vit.layernorm")
    spread(model, images())
    stopped, whole = model.infer(images()), model.infer(images(), compact=False)
    assert len(stopped.exit_index.unique()) >= 2
    torch.testing.assert_close(stopped.logits, whole.logits)


class Masked(nn.Module):
    """Blocks that take a weight per input under a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, strength=strength)
        return self.head(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        return x + strength * self.linear(x)


def test_other_arguments_are_cut_by_name_and_missing_names_are_found() -> None:
    torch.manual_seed(0)
    x, strength = torch.randn(20, 6), torch.rand(20, 1)
    model = EarlyExit(Masked(), 4, dim=6, batched=("strength",))
    spread(model, x, strength)
    stopped, whole = model.infer(x, strength), model.infer(x, strength, compact=False)
    assert len(stopped.exit_index.unique()) == 3
    torch.testing.assert_close(stopped.logits, whole.logits)
    unnamed = EarlyExit(Masked(), 4, dim=6)
    unnamed.load_state_dict(model.state_dict())
    one_stays = [int((whole.exit_index > 0).nonzero()[0]), *(whole.exit_index == 0).nonzero().flatten().tolist()]
    with pytest.raises(ValueError, match="batched must name every argument"):
        # One input is left, whose row broadcasts over the weights of all.
        unnamed.eval().infer(x[one_stays], strength[one_stays])


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.num_features = 3, 4
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean(dim=(2, 3)))


def test_named_stages_of_a_convolutional_net_are_averaged_over_places() -> None:
    torch.manual_seed(0)
    model = EarlyExit(Convolutional(), exits=["stem", "stage1"])
    outputs = model.eval()(images(4))
    torch.testing.assert_close(outputs.features[:, 0], model.backbone.stem(images(4)).mean(dim=(2, 3)))  # type: ignore[operator]
    assert model.costs.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


def test_statistics_of_a_frozen_backbone_stay_where_they_are() -> None:
    model = EarlyExit(Convolutional(), exits=["stem", "stage1"]).train()
    before = copy.deepcopy(model.backbone.state_dict())
    model(images(6) + 3)
    assert model.training
    assert model.exits.training
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_stochastic_depth_of_the_backbone_stays_on_in_training() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(8, 3, 2, img_size=8, patch_size=4, in_chans=2, num_classes=3, drop_path_rate=0.5)
    model = EarlyExit(backbone, norm="norm").train()
    assert not torch.equal(model(images(4)).logits[-1], model(images(4)).logits[-1])
    model.eval()
    assert torch.equal(model(images(4)).logits, model(images(4)).logits)


def test_a_copy_and_a_saved_model_have_hooks_of_their_own(model: EarlyExit) -> None:
    twin = copy.deepcopy(model)
    for gate in twin.exits.gates:
        nn.init.constant_(gate.linear.bias, 100.0)
    assert twin.infer(images()).exit_index.max() == 0
    assert model.infer(images()).exit_index.max() > 0
    assert twin.taps is not model.taps


def test_the_backbone_works_as_before_and_is_handed_back_without_hooks(model: EarlyExit) -> None:
    plain = vision()
    plain.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(model.backbone(images()), plain.eval()(images()))
    released = model.release()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in released.modules())


def test_a_failing_pass_leaves_no_visitor_behind(model: EarlyExit) -> None:
    with pytest.raises(ValueError, match="images must have"):
        model.infer(images()[:, :1])
    assert model.taps.visitor is None
    assert model.taps.rows is None
    torch.testing.assert_close(model.infer(images()).logits, model.infer(images(), compact=False).logits)


def test_answers_do_not_depend_on_the_rest_of_the_batch(model: EarlyExit) -> None:
    x = images()
    whole = model.infer(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    turned = model.infer(x[order])
    assert torch.equal(turned.exit_index, whole.exit_index[order])
    torch.testing.assert_close(turned.logits, whole.logits[order])
    single = model.infer(x[7:8])
    torch.testing.assert_close(single.logits, whole.logits[7:8])


def test_logits_that_are_not_finite_are_refused(model: EarlyExit) -> None:
    broken = images()
    broken[3] = torch.inf
    with pytest.raises(ValueError, match="logits must be finite"):
        model.infer(broken)


def test_gates_and_heads_of_ones_own() -> None:
    class Confident(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor) -> Tensor:
            assert not logits.requires_grad
            return self.scale * logits.amax(dim=1, keepdim=True)

    exits = ExitHeads(
        6, 3, 2, gate=Confident(), head=lambda dim, classes: nn.Sequential(nn.Tanh(), nn.Linear(dim, classes))
    )
    outputs = exits(torch.randn(4, 2, 6), torch.randn(4, 3))
    torch.testing.assert_close(outputs.gate_logits, outputs.logits[:-1].amax(dim=2).T)
    assert exits.gates[0] is not exits.gates[1]


def test_heads_start_small_and_gates_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    exits = ExitHeads(64, 10, 3)
    for head in exits.heads:
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert (head.bias == 0).all()
    gate = exits.gates[0]
    assert isinstance(gate, UncertaintyGate)
    assert sum(parameter.numel() for parameter in gate.parameters()) == 5


def test_costs_of_a_profile_are_those_of_its_layers() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_classes, self.num_features = 3, 8
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = EarlyExit(Plain())
    profile = profile_costs(model, torch.zeros(1, 8))
    step = 64 + 24 + 9 * 3 + 6
    assert profile.multiply_adds.tolist() == [step, 2 * step, 2 * step + 64 + 24]
    assert profile.normalized[-1] == 1
    with pytest.raises(ValueError, match="one input to profile, got 2"):
        profile_costs(model, torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"exits": [1, 0]}, ValueError, "increasing order"),
        ({"exits": [0, 0]}, ValueError, "increasing order"),
        ({"exits": [0, 3]}, ValueError, r"in \[0, 2\] for a backbone of 4"),
        ({"exits": [-1]}, ValueError, "increasing order"),
        ({"exits": []}, ValueError, "increasing order"),
        ({"exits": [0, "blocks.1"]}, TypeError, "positions of blocks, or all names"),
        ({"exits": ["blocks.9"]}, ValueError, "different submodules"),
        ({"exits": ["blocks.0"], "blocks": "blocks"}, ValueError, "blocks is for exits by position"),
        ({"blocks": "layers"}, ValueError, "blocks must name a list"),
        ({"norm": "final_norm"}, ValueError, "norm must name a submodule"),
        ({"pool": "max"}, ValueError, "pool must be one of"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2"),
        ({"costs": [0.5, 0.4, 0.9, 1.0]}, ValueError, "rise"),
        ({"costs": [0.5, 1.0]}, ValueError, "each of the 4 exits, got 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EarlyExit(vision(), **arguments)


def test_what_cannot_be_read_from_a_backbone_must_be_given() -> None:
    with pytest.raises(TypeError, match="backbone must be a module"):
        EarlyExit("vit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must be given for a Sequential"):
        EarlyExit(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)), 3)
    with pytest.raises(ValueError, match="pool must give"):
        EarlyExit(vision(), dim=7)(images(2))


def test_exits_that_run_in_another_order_are_found() -> None:
    model = EarlyExit(Convolutional(), exits=["stage1", "stem"]).eval()
    with pytest.raises(ValueError, match="in the order in which they run"):
        model(images(2))
