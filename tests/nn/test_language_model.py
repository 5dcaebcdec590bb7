"""The skeleton around a mixer: what it computes, how it starts, what it passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.nn import FeedForward, MixerLM, MixerLMOutput, MultiHeadAttention

TOKENS = torch.tensor([[1, 4, 2, 2], [0, 3, 3, 1]])


def attention(layer: int) -> nn.Module:
    return MultiHeadAttention(8, causal=True)


def build(mixer: Callable[[int], nn.Module] = attention, **options: Any) -> MixerLM:
    torch.manual_seed(0)
    return MixerLM(8, 2, 5, mixer=mixer, **options)


@pytest.mark.parametrize("with_network", [False, True])
def test_the_model_is_its_formula(with_network: bool) -> None:
    model = build(state_mixer=(lambda layer: FeedForward(8)) if with_network else None, max_positions=6).eval()
    hidden = model.embedding(TOKENS) + model.positions.weight[:4]
    residual = torch.zeros_like(hidden)
    for block in model.blocks:
        residual = residual + hidden
        residual = residual + block.mixer(block.norm1(residual))
        hidden = block.norm2(residual)
        hidden = block.state_mixer(hidden) if with_network else hidden
    features = model.norm(residual + hidden)
    torch.testing.assert_close(model.forward_features(TOKENS), features)
    torch.testing.assert_close(model(TOKENS), features @ model.embedding.weight.T)


def test_weights_start_as_published() -> None:
    torch.manual_seed(0)
    model = MixerLM(
        64,
        3,
        400,
        mixer=lambda layer: MultiHeadAttention(64),
        state_mixer=lambda layer: FeedForward(64),
        max_positions=50,
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert set(parameter.tolist()) <= {0.0, 1.0}
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            expected = 0.02 / 6**0.5 if name.endswith(("out_proj.weight", "fc2.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.06), name


class Foreign(nn.Module):
    """A layer as flash-linear-attention writes them: options that nobody gives, and a tuple of three."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> tuple[Tensor, None, None]:
        assert not options
        return self.o_proj(hidden_states), None, None


def test_a_mixer_that_returns_a_tuple_is_taken_as_it_is() -> None:
    model = build(lambda layer: Foreign(8)).eval()
    plain = build(lambda layer: nn.Linear(8, 8)).eval()
    for ours, theirs in zip(plain.blocks, model.blocks, strict=True):
        ours.mixer.load_state_dict(theirs.mixer.o_proj.state_dict())
    plain.embedding.load_state_dict(model.embedding.state_dict())
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    assert model.state_size(10) is None


class Costly(nn.Module):
    """Looks at the token ids and asks for something to be added to the loss."""

    needs_tokens = True
    has_aux_loss = True

    def __init__(self, cost: float) -> None:
        super().__init__()
        self.cost = nn.Parameter(torch.tensor(cost))

    def forward(self, x: Tensor, tokens: Tensor, return_aux: bool) -> tuple[Tensor, Tensor]:
        assert return_aux
        return x * tokens[..., None], self.cost * tokens.sum()

    def state_size(self, length: int) -> int:
        return 3 * length


def test_auxiliary_losses_are_summed_and_differentiable() -> None:
    model = build(lambda layer: Costly(1.0 + layer))
    output = model(TOKENS, return_aux=True)
    assert isinstance(output, MixerLMOutput)
    assert output.aux_loss.item() == 3 * 16
    output.aux_loss.backward()
    assert [block.mixer.cost.grad.item() for block in model.blocks] == [16, 16]
    torch.testing.assert_close(model.eval()(TOKENS), model(TOKENS, return_aux=True).logits)
    assert build()(TOKENS, return_aux=True).aux_loss == 0


def test_the_state_is_summed_over_blocks() -> None:
    assert build(lambda layer: Costly(0.0)).state_size(10) == 60
    assert build().state_size(10) == 2 * 2 * 10 * 8


def test_dropout_stands_where_the_published_model_has_it() -> None:
    model = build(embedding_dropout=0.5)
    assert [block.dropout1.p for block in model.blocks] == [0.5, 0.0]
    assert not torch.allclose(model(TOKENS), model(TOKENS))
    model.blocks[0].dropout1.p = 0.0
    assert torch.equal(model(TOKENS), model.eval()(TOKENS))


def test_a_dropped_path_leaves_the_residual_stream() -> None:
    model = build(drop_path=1.0, embedding_dropout=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    assert (model.blocks[0].mixer(model.blocks[0].norm1(torch.zeros(2, 4, 8))) != 0).all()
    # Every branch is dropped, so the stream is zero and each token gets the logits of a zero vector.
    expected = F.linear(model.norm(torch.zeros(8) + model.blocks[1].norm2(torch.zeros(8))), model.embedding.weight)
    torch.testing.assert_close(model(TOKENS), expected.expand(2, 4, 5))


def test_a_frozen_embedding_and_a_padded_vocabulary() -> None:
    model = build(learn_embedding=False, vocab_multiple=4)
    assert model(TOKENS).shape == (2, 4, 8)
    model(TOKENS).sum().backward()
    assert model.embedding.weight.grad is None
    assert model.blocks[0].mixer.qkv.weight.grad is not None


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="max_positions=3, got length=4"):
        build(max_positions=3)(TOKENS)
    with pytest.raises(TypeError, match="int64"):
        build()(TOKENS.float())
    with pytest.raises(ValueError, match="tokens must have shape"):
        build()(TOKENS[0])
    with pytest.raises(ValueError, match="depth must be positive"):
        MixerLM(8, 0, 5, mixer=attention)
    with pytest.raises(ValueError, match="max_positions"):
        build(max_positions=-1)
    with pytest.raises(ValueError, match="dropout"):
        build(dropout=2.0)
