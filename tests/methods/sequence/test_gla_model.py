"""Block and backbone: residuals and norms, padding removed once, gradient checkpointing, carried states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate import GLABlock, GLACache, GLAModel
from headgate.methods.sequence.gla.feed_forward import SwiGLU
from headgate.nn import swiglu_size


def build(seed: int = 0, **options: Any) -> GLAModel:
    """A small model in float64, with weights large enough for every part to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GLAModel(13, 16, 3, 4, 24, **options).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 0, 1, 1, 0, 1, 0]])


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_a_block_adds_each_branch_to_the_sum_before_it():
    block = GLABlock(16, 4, 24).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    y = x + block.attn(normed(x, block.attn_norm.weight))
    inner = normed(y, block.mlp_norm.weight)
    gate, up = inner @ block.mlp.gate_proj.weight.T, inner @ block.mlp.up_proj.weight.T
    expected = y + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T
    torch.testing.assert_close(block(x), expected)


def test_the_model_is_embedding_blocks_and_norm():
    model, tokens = build(), ids(2, 7)
    hidden = model.embeddings.weight[tokens]
    for block in model.layers:
        hidden = block(hidden)
    torch.testing.assert_close(model(tokens), normed(hidden, model.norm.weight))


@pytest.mark.parametrize(("dim", "width"), [(1024, 2816), (2048, 5632), (96, 256), (97, 512), (768, 2048)])
def test_the_width_of_the_swiglu_is_the_published_one(dim: int, width: int):
    assert swiglu_size(dim) == width
    with torch.device("meta"):
        assert SwiGLU(dim).up_proj.weight.shape == (width, dim)


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True}, {"variant": "first_release"}])
def test_padding_counts_as_if_it_were_not_there(options: dict[str, Any]):
    model, tokens = build(**options), ids(3, 7)
    features = model(tokens, MASK)
    for row in range(3):
        real = MASK[row].bool()
        torch.testing.assert_close(features[row, real], model(tokens[row : row + 1, real])[0])
        assert (features[row, ~real] == 0).all()


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True}])
def test_prompt_in_chunks_and_single_tokens_give_the_whole(options: dict[str, Any]):
    model, tokens, mask = build(**options), ids(3, 11), F.pad(MASK, (0, 4), value=1)
    expected = model(tokens, mask)
    cache, parts, seen = GLACache(), [], 0
    with torch.no_grad():
        for part in tokens.split([1, 4, 2, 1, 2, 1], dim=1):
            seen += part.shape[1]
            parts.append(model(part, mask[:, :seen], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    assert len(cache) == 3
    assert cache.get_seq_length() == 11


def test_the_states_that_are_kept_have_the_stated_size_however_long_the_text():
    model = build(use_short_conv=True)
    expected = 2 * model.state_size(50)
    assert expected == 2 * 3 * (4 * 2 * 4 + 3 * (8 + 8 + 16))
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :7] = 0
    for arguments in ((ids(2, 5),), (ids(2, 50),), (ids(2, 50), mask)):
        cache = GLACache()
        with torch.no_grad():
            model(*arguments, cache=cache)
            model(ids(2, 1), cache=cache)
        kept = [part for index in range(3) for part in (cache[index].memory, *cache[index].recent)]
        assert sum(part.numel() for part in kept) == expected
        # … and nothing larger is kept alive behind them.
        assert sum(part.untyped_storage().nbytes() for part in kept) == 8 * expected


def test_packed_texts_do_not_see_each_other():
    model, tokens = build(), ids(1, 9)
    packed = model(tokens, cu_seqlens=torch.tensor([0, 4, 9]))
    torch.testing.assert_close(packed, torch.cat([model(tokens[:, :4]), model(tokens[:, 4:])], dim=1))


def gradients(model: GLAModel, *arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    features = model(*arguments)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(7), dtype=features.dtype)
    (features * weight).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_leaves_gradients_as_they_are(every: int, mask: Tensor | None):
    model, tokens = build(use_short_conv=True), ids(3, 7)
    expected = gradients(model, tokens, mask)
    calls: list[int] = []
    for index, block in enumerate(model.layers):
        block.attn.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    model.set_gradient_checkpointing(every=every)
    torch.testing.assert_close(gradients(model, tokens, mask), expected)
    assert sorted(calls) == sorted([0, 1, 2] + [index for index in range(3) if index % every == 0])
    model.set_gradient_checkpointing(False)
    calls.clear()
    gradients(model, tokens, mask)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_truncated_backpropagation_carries_states_but_no_gradients(checkpointing: bool):
    model, tokens = build(use_short_conv=True), ids(2, 12)
    model.set_gradient_checkpointing(checkpointing)
    whole = model(tokens)
    cache = GLACache()
    for segment, expected in zip(tokens.split(4, dim=1), whole.split(4, dim=1), strict=True):
        model.zero_grad()
        features = model(segment, cache=cache)
        torch.testing.assert_close(features, expected)
        features.sum().backward()
        cache.detach()
        assert not cache[0].memory.requires_grad
    assert cache.get_seq_length() == 12
    # The last segment's gradient is that with the states before it held fixed.
    last = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.set_gradient_checkpointing(False)
    cache = GLACache()
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
    model.zero_grad()
    model(tokens[:, 8:], cache=cache).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, last[name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_detaching_gradients_pass_through_the_states(checkpointing: bool):
    model, tokens = build(use_short_conv=True), ids(2, 8)
    expected = gradients(model, tokens)
    model.set_gradient_checkpointing(checkpointing)
    model.zero_grad()
    cache = GLACache()
    features = torch.cat([model(part, cache=cache) for part in tokens.split([3, 5], dim=1)], dim=1)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(7), dtype=features.dtype)
    (features * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_what_enters_each_block_comes_back_when_asked_for():
    model, tokens = build(), ids(3, 7)
    embedded = model.embeddings(tokens)
    features, states = model.encode(embedded, MASK, return_hidden_states=True)
    assert len(states) == 4
    kept = MASK[..., None].double()
    torch.testing.assert_close(states[0], embedded * kept)
    torch.testing.assert_close(states[1], model.layers[0](embedded, MASK) * kept)
    torch.testing.assert_close(states[3], features)
    assert model.encode(embedded, MASK).hidden_states == ()


def test_the_embedding_of_padding_gets_no_gradient():
    model = build(padding_idx=3)
    tokens = torch.tensor([[3, 1, 2, 3]])
    assert (gradients(model, tokens)["embeddings.weight"][3] == 0).all()
    assert (gradients(build(), tokens)["embeddings.weight"][3] != 0).any()


def test_weights_drawn_anew_have_the_asked_for_spread():
    model = GLAModel(50, 64, 1, 4, variant="first_release")
    model.reset_parameters(0.5)
    block = model.layers[0]
    for weight in (model.embeddings.weight, block.mlp.down_proj.weight, block.attn.v_proj.weight):
        assert weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert block.attn.q_proj.weight.abs().max() <= 2**-2.5 * (6 / 96) ** 0.5


def test_bad_input_is_refused_by_name():
    model = build()
    with pytest.raises(TypeError, match="tokens must be int64 or int32"):
        model(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, length\)"):
        model(ids(3))
    with pytest.raises(ValueError, match="at least one"):
        model(ids(2, 0))
    with pytest.raises(ValueError, match="single pairs of tokens"):
        model(ids(2, 3), torch.ones(2, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="must not both be given"):
        model(ids(1, 3), torch.ones(1, 3, dtype=torch.long), None, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="inputs_embeds must have dim=16"):
        model.encode(torch.zeros(2, 3, 15, dtype=torch.float64))
    with pytest.raises(ValueError, match="depth must be positive"):
        GLAModel(13, 16, 0)
    with pytest.raises(ValueError, match="every must be positive"):
        model.set_gradient_checkpointing(every=0)
