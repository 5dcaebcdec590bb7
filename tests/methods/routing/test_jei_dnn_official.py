"""T2T-ViT against its definition, and official state dicts under our names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.methods.routing.jei_dnn import T2TViT, early_exit_t2t_vit
from headgate.methods.routing.jei_dnn.official import (
    convert_backbone,
    convert_exits,
    early_exit_from_official,
    exit_heads_from_official,
    t2t_vit_from_official,
)
from headgate.methods.routing.jei_dnn.profile import profile_costs

DIM, DEPTH, HEADS, CLASSES = 128, 3, 2, 7


def official_state(prefix: str = "module.") -> dict[str, Tensor]:
    """Random weights under the official names, of a small network at 32 pixels with exits behind two of three blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 5, DIM),
        "tokens_to_token.project.weight": (DIM, 576),
        "tokens_to_token.project.bias": (DIM,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
        "head.weight": (CLASSES, DIM),
        "head.bias": (CLASSES,),
    }
    for name, width in (("attention1", 147), ("attention2", 576)):
        part = f"tokens_to_token.{name}"
        shapes |= {
            f"{part}.w": (32, 64),
            f"{part}.kqv.weight": (192, width),
            f"{part}.kqv.bias": (192,),
            f"{part}.proj.weight": (64, 64),
            f"{part}.proj.bias": (64,),
            f"{part}.norm1.weight": (width,),
            f"{part}.norm1.bias": (width,),
            f"{part}.norm2.weight": (64,),
            f"{part}.norm2.bias": (64,),
            f"{part}.mlp.0.weight": (64, 64),
            f"{part}.mlp.0.bias": (64,),
            f"{part}.mlp.2.weight": (64, 64),
            f"{part}.mlp.2.bias": (64,),
        }
    for index in range(DEPTH):
        block = f"blocks.{index}"
        shapes |= {
            f"{block}.norm1.weight": (DIM,),
            f"{block}.norm1.bias": (DIM,),
            f"{block}.attn.qkv.weight": (3 * DIM, DIM),
            f"{block}.attn.proj.weight": (DIM, DIM),
            f"{block}.attn.proj.bias": (DIM,),
            f"{block}.norm2.weight": (DIM,),
            f"{block}.norm2.bias": (DIM,),
            f"{block}.mlp.fc1.weight": (2 * DIM, DIM),
            f"{block}.mlp.fc1.bias": (2 * DIM,),
            f"{block}.mlp.fc2.weight": (DIM, 2 * DIM),
            f"{block}.mlp.fc2.bias": (DIM,),
        }
    for index in range(DEPTH - 1):
        shapes |= {
            f"intermediate_heads.{index}.weight": (CLASSES, DIM),
            f"intermediate_heads.{index}.bias": (CLASSES,),
            f"gates.{index}.linear.weight": (1, 4),
            f"gates.{index}.linear.bias": (1,),
        }
    return {
        prefix + name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()
    }


def reference(state: dict[str, Tensor], images: Tensor, scale: float | None = None) -> tuple[Tensor, list[Tensor]]:
    """The network written out on the official names: final logits, and the normed class token behind each block."""
    w = {name.removeprefix("module."): tensor for name, tensor in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def features(x: Tensor, directions: Tensor) -> Tensor:
        rows = [
            [
                torch.exp(directions @ token - token.square().sum() / 2) / math.sqrt(len(directions))
                for token in sequence
            ]
            for sequence in x
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def performer(name: str, x: Tensor) -> Tensor:
        k, q, v = linear(f"{name}.kqv", norm(f"{name}.norm1", x)).split(64, dim=-1)
        kp, qp = features(k, w[f"{name}.w"]), features(q, w[f"{name}.w"])
        weight = qp @ kp.transpose(1, 2)
        y = (weight @ v) / (weight.sum(dim=-1, keepdim=True) + 1e-8)
        y = v + linear(f"{name}.proj", y)
        inner = F.gelu(linear(f"{name}.mlp.0", norm(f"{name}.norm2", y)))
        return y + linear(f"{name}.mlp.2", inner)

    maps = images
    for (kernel, stride, padding), name, side in (((7, 4, 2), "attention1", 8), ((3, 2, 1), "attention2", 4)):
        tokens = F.unfold(maps, kernel, padding=padding, stride=stride).transpose(1, 2)
        tokens = performer(f"tokens_to_token.{name}", tokens)
        maps = tokens.transpose(1, 2).reshape(len(images), 64, side, side)
    tokens = F.unfold(maps, 3, padding=1, stride=2).transpose(1, 2)
    x = linear("tokens_to_token.project", tokens)
    x = torch.cat([w["cls_token"].expand(len(images), -1, -1), x], dim=1) + w["pos_embed"]
    seen = []
    for index in range(DEPTH):
        name = f"blocks.{index}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).reshape(len(images), -1, 3, HEADS, DIM // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (scale or (DIM // HEADS) ** -0.5)).softmax(dim=-1)
        x = x + linear(f"{name}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
        x = x + linear(f"{name}.mlp.fc2", inner)
        seen.append(norm("norm", x)[:, 0])
    return linear("head", seen[-1]), seen[:-1]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("qk_scale", [None, DIM**-0.5])
def test_official_weights_give_the_network_s_own_logits(images: Tensor, qk_scale: float | None) -> None:
    state = official_state()
    model = early_exit_from_official(state, qk_scale=qk_scale).eval()
    outputs = model(images)
    final, seen = reference(state, images, qk_scale)
    torch.testing.assert_close(outputs.logits[-1], final, rtol=1e-4, atol=1e-4)
    for place, z in enumerate(seen):
        torch.testing.assert_close(outputs.features[:, place], z, rtol=1e-4, atol=1e-4)
        weight, bias = (state[f"module.intermediate_heads.{place}.{part}"] for part in ("weight", "bias"))
        torch.testing.assert_close(outputs.logits[place], F.linear(z, weight, bias), rtol=1e-4, atol=1e-4)
    assert model.num_gates == DEPTH - 1
    assert model.exit_names == ("blocks.0", "blocks.1")


def test_backbone_heads_and_gates_come_apart(images: Tensor) -> None:
    state = official_state(prefix="")
    backbone = t2t_vit_from_official(state).eval()
    torch.testing.assert_close(backbone(images), reference(state, images)[0], rtol=1e-4, atol=1e-4)
    exits, final = exit_heads_from_official(state)
    assert torch.equal(final.weight, state["head.weight"])
    assert torch.equal(exits.gates[1].linear.weight, state["gates.1.linear.weight"])
    assert set(convert_exits(state)) == set(exits.state_dict())
    assert set(convert_backbone(state)) == set(backbone.state_dict())


def test_incomplete_state_dicts_are_refused() -> None:
    state = official_state(prefix="")
    with pytest.raises(ValueError, match="T2T-ViT with cls_token, got nothing"):
        convert_backbone({})
    with pytest.raises(ValueError, match="as many intermediate_heads as gates, got 2 and 1"):
        convert_exits({name: tensor for name, tensor in state.items() if not name.startswith("gates.1")})
    with pytest.raises(ValueError, match=r"head\.weight"):
        exit_heads_from_official({name: tensor for name, tensor in state.items() if not name.startswith("head.")})


@pytest.mark.parametrize(("sizes", "published"), [((256, 7, 4, 512), 1.1e9), ((384, 14, 6, 1152), 4.8e9)])
def test_multiply_adds_are_those_that_were_published(sizes: tuple[int, int, int, int], published: float) -> None:
    dim, depth, heads, mlp_dim = sizes
    with torch.device("meta"):
        model = early_exit_t2t_vit(dim, depth, heads, mlp_dim=mlp_dim)
        costs = profile_costs(model, torch.empty(1, 3, 224, 224))
    assert float(costs.multiply_adds[-1]) == pytest.approx(published, rel=0.05)
    assert model.num_gates == depth - 1


def test_positions_are_sines_and_cosines() -> None:
    positions = T2TViT(8, 1, 2, img_size=32, num_classes=0).position_embedding[0]
    for place in range(5):
        for channel in range(8):
            angle = place / 10000 ** (2 * (channel // 2) / 8)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert float(positions[place, channel]) == pytest.approx(expected, abs=1e-6)


def test_the_classifier_can_be_replaced() -> None:
    model = T2TViT(8, 1, 2, img_size=16, num_classes=3).eval()
    x = torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens[:, 0])
    with pytest.raises(ValueError, match="num_classes must be 0"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="img_size must be a multiple of 16"):
        T2TViT(8, 1, 2, img_size=40)
