"""The layer: its equations, its two variants, and that no way of cutting a sequence changes what it computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate import GatedLinearAttention, GLACache
from headgate.nn import LowRankLogGate, MixerLM

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "convolutions": {"use_short_conv": True, "conv_size": 3, "conv_bias": True},
    "shared heads": {"num_kv_heads": 2, "expand_v": 2.0, "clamp_min": -0.5},
    "feature map, no gate": {"feature_map": "relu", "use_output_gate": False, "expand_k": 1.0},
    "first release": {"variant": "first_release"},
}


def build(seed: int = 0, dim: int = 16, num_heads: int = 4, **options: Any) -> GatedLinearAttention:
    """A layer in float64, with weights large enough for gates and norms to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = GatedLinearAttention(dim, num_heads, **options).double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.4)
    return layer


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(layer: GatedLinearAttention, x: Tensor, *, tau: float = 16.0, clamp: float | None = None) -> Tensor:
    """The equations of the paper for one sequence ``(length, dim)``, head by head and token by token."""
    q, k, v = x @ layer.q_proj.weight.T, x @ layer.k_proj.weight.T, x @ layer.v_proj.weight.T
    assert isinstance(layer.log_gate, LowRankLogGate)
    logits = x @ layer.log_gate.down.weight.T @ layer.log_gate.up.weight.T + layer.log_gate.up.bias
    alpha = torch.sigmoid(logits) ** (1 / tau)
    if clamp is not None:
        alpha = alpha.clamp_min(torch.tensor(clamp).double().exp())
    first_release = layer.variant == "first_release"
    heads, size_k, size_v = layer.num_heads, layer.head_key_dim, layer.head_value_dim
    shared = heads // layer.num_kv_heads
    rows = []
    memory = [torch.zeros(size_k, size_v, dtype=x.dtype) for _ in range(heads)]
    for t in range(x.shape[0]):
        row = []
        for head in range(heads):
            kv = head // shared
            key, gate = (z[t, kv * size_k : (kv + 1) * size_k] for z in (k, alpha))
            value = v[t, kv * size_v : (kv + 1) * size_v]
            if first_release:
                key = key * (x.shape[1] / heads) ** -0.5
            memory[head] = gate[:, None] * memory[head] + torch.outer(key, value)
            o = q[t, head * size_k : (head + 1) * size_k] @ memory[head] / size_k**0.5
            if first_release:
                o = (o - o.mean()) / (o.var(correction=0) + 1e-5).sqrt()
            else:
                o = layer.norm.weight * o / (o.square().mean() + 1e-5).sqrt()
            row.append(o)
        rows.append(torch.cat(row))
    assert layer.g_proj is not None
    gate = x @ layer.g_proj.weight.T
    if first_release:
        gate = gate + layer.g_proj.bias
    return (torch.stack(rows) * gate * torch.sigmoid(gate)) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    ("options", "tau", "clamp"),
    [
        ({}, 16.0, None),
        ({"variant": "first_release"}, 16.0, None),
        ({"num_kv_heads": 1, "gate_logit_normalizer": 2, "clamp_min": -0.2, "expand_v": 0.5}, 2.0, -0.2),
    ],
)
def test_the_layer_computes_the_equations_of_the_paper(options: dict[str, Any], tau: float, clamp: float | None):
    layer, x = build(**options), tokens(11, 16)
    torch.testing.assert_close(layer(x[None])[0], slow(layer, x, tau=tau, clamp=clamp))


def test_short_convolutions_act_before_the_heads():
    layer, x = build(use_short_conv=True, conv_size=3), tokens(2, 7, 16)
    plain = build(use_short_conv=False)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("convolutions")})

    def convolved(projection: nn.Module, conv: nn.Module) -> nn.Module:
        class Convolved(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = projection(x).transpose(1, 2)
                return F.silu(F.conv1d(F.pad(y, (2, 0)), conv.weight[:, None], groups=y.shape[1])).transpose(1, 2)

        return Convolved()

    plain_parts = zip(("q_proj", "k_proj", "v_proj"), layer.convolutions, strict=True)
    weight_dtype = plain.q_proj.weight.dtype
    for name, conv in plain_parts:
        module = convolved(getattr(plain, name), conv)
        module.weight = nn.Parameter(torch.empty(0, dtype=weight_dtype))
        setattr(plain, name, module)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_sees_no_later_one(name: str):
    layer, x = build(**OPTIONS[name]), tokens(1, 12, 16)
    changed = x.clone()
    changed[:, 7:] += 1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", OPTIONS)
def test_any_cut_of_a_sequence_and_single_tokens_give_the_whole(name: str):
    layer, x = build(**OPTIONS[name]), tokens(3, 13, 16)
    expected = layer(x)
    cache = GLACache()
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split([1, 5, 2, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    assert cache.get_seq_length() == 13
    assert sum(t.numel() for t in (cache[0].memory, *cache[0].recent)) == 3 * layer.state_size(13)


def test_single_tokens_change_the_memory_in_place():
    layer, x = build(), tokens(2, 6, 16)
    cache = GLACache()
    with torch.no_grad():
        layer(x[:, :3], cache=cache)
        layer(x[:, 3:4], cache=cache)
        place = cache[0].memory.data_ptr()
        layer(x[:, 4:5], cache=cache)
        layer(x[:, 5:6], cache=cache)
    assert cache[0].memory.data_ptr() == place


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 0, 0, 0, 0, 0, 0], [1] * 8, [1, 1, 1, 1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0, 1, 0]],
    "an empty row": [[0] * 8, [1] * 8, [0, 0, 0, 0, 1, 0, 0, 0]],
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("where", MASKS)
def test_padding_counts_as_if_it_were_not_there(where: str, name: str):
    layer, x, mask = build(**OPTIONS[name]), tokens(3, 8, 16), torch.tensor(MASKS[where])
    y = layer(x, mask)
    for row in range(3):
        real = mask[row].bool()
        if real.any():
            torch.testing.assert_close(y[row, real], layer(x[row : row + 1, real])[0])
        assert (y[row, ~real] == 0).all()
    torch.testing.assert_close(layer(x, mask.bool()), y)


@pytest.mark.parametrize("name", ["plain", "convolutions", "shared heads"])
@pytest.mark.parametrize("where", MASKS)
def test_a_padded_batch_in_chunks_and_steps_gives_the_whole(where: str, name: str):
    layer, x, mask = build(**OPTIONS[name]), tokens(3, 8, 16), torch.tensor(MASKS[where])
    x, mask = torch.cat([x, tokens(3, 3, 16, seed=1)], dim=1), F.pad(mask, (0, 3), value=1)
    expected = layer(x, mask)
    cache, parts, seen = GLACache(), [], 0
    with torch.no_grad():
        for part in x.split([2, 4, 2, 1, 1, 1], dim=1):
            seen += part.shape[1]
            parts.append(layer(part, mask[:, :seen], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    assert cache.get_seq_length() == 11


def test_a_chunk_of_padding_alone_leaves_the_states_alone():
    layer, x = build(use_short_conv=True), tokens(2, 6, 16)
    cache = GLACache()
    nothing = torch.zeros(2, 2, dtype=torch.long)
    assert (layer(x[:, :2], nothing, cache) == 0).all()
    assert cache.get_seq_length() == 2
    layer(x[:, 2:4], cache=cache)
    memory = cache[0].memory
    layer(x[:, :2], nothing, cache)
    torch.testing.assert_close(cache[0].memory, memory)
    torch.testing.assert_close(layer(x[:, 4:], cache=cache), layer(x[:, 2:])[:, 2:])
    assert cache.get_seq_length() == 8


def test_gradients_pass_by_padding():
    layer, mask = build(use_short_conv=True), torch.tensor(MASKS["holes"])
    x = tokens(3, 8, 16).requires_grad_()
    weight = tokens(3, 8, 16, seed=2)
    (layer(x, mask) * weight).sum().backward()
    assert x.grad is not None
    assert (x.grad[mask == 0] == 0).all()
    alone = x.detach()[:1, mask[0].bool()].clone().requires_grad_()
    (layer(alone)[0] * weight[0, mask[0].bool()]).sum().backward()
    assert alone.grad is not None
    torch.testing.assert_close(x.grad[0, mask[0].bool()], alone.grad[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_sequences_do_not_see_each_other_and_go_on_from_their_states(name: str):
    layer, x = build(**OPTIONS[name]), tokens(1, 12, 16)
    bounds = [0, 5, 6, 12]
    alone = [layer(x[:, start:end]) for start, end in itertools.pairwise(bounds)]
    cache = GLACache()
    torch.testing.assert_close(layer(x, None, cache, torch.tensor(bounds)), torch.cat(alone, dim=1))
    more = tokens(3, 4, 16, seed=3)
    going_on = layer(more, cache=cache)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        whole = layer(torch.cat([x[:, start:end], more[n : n + 1]], dim=1))
        torch.testing.assert_close(going_on[n : n + 1], whole[:, end - start :])


def test_selected_states_go_on_as_the_sequences_they_belong_to():
    layer, x, more = build(use_short_conv=True), tokens(3, 5, 16), tokens(4, 2, 16, seed=1)
    rows = torch.tensor([2, 0, 0, 1])
    cache = GLACache()
    with torch.no_grad():
        layer(x, cache=cache)
        layer(x[:, :1], cache=cache)
        chosen = cache.select(rows)
        kept = cache[0].memory.clone()
        steps = [layer(token, cache=chosen) for token in more.split(1, dim=1)]
        torch.testing.assert_close(cache[0].memory, kept)
        assert chosen.batch_size == 4
        whole = layer(torch.cat([x, x[:, :1]], dim=1)[rows], cache=(again := GLACache()))
        assert whole.shape == (4, 6, 16)
        torch.testing.assert_close(torch.cat(steps, dim=1), layer(more, cache=again))


def test_shared_heads_equal_repeated_ones():
    shared = build(num_kv_heads=2)
    full = build(num_kv_heads=4)
    weights = shared.state_dict()
    for name, size in (("k_proj.weight", 2), ("v_proj.weight", 4), ("log_gate.up.weight", 2), ("log_gate.up.bias", 2)):
        weights[name] = weights[name].unflatten(0, (2, size)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = tokens(2, 9, 16)
    torch.testing.assert_close(shared(x), full(x))


def test_the_two_variants_compute_different_functions():
    fla, first = build(), build(variant="first_release")
    fla.norm.weight.data.fill_(1)
    assert first.g_proj is not None
    assert first.g_proj.bias is not None
    first.g_proj.bias.data.zero_()
    first.load_state_dict({**first.state_dict(), **{k: v for k, v in fla.state_dict().items() if k != "norm.weight"}})
    x = tokens(2, 9, 16)
    assert (fla(x) - first(x)).abs().max() > 0.05
    assert not dict(first.norm.named_parameters())


def test_another_gate_may_take_the_place_of_the_low_rank_one():
    class Fixed(nn.Module):
        def __init__(self, log_decay: float, channels: int) -> None:
            super().__init__()
            self.register_buffer("log_decay", torch.full((channels,), log_decay, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.log_decay.expand(*x.shape[:2], -1)

    layer, x = build(), tokens(1, 9, 16)
    layer.log_gate = Fixed(-1e4, 8)
    alone = layer(x[:, 5:6])
    torch.testing.assert_close(layer(x)[:, 5:6], alone)
    layer.log_gate = Fixed(0.0, 8)
    assert not torch.allclose(layer(x)[:, 5:6], alone)
    layer.log_gate = Fixed(0.0, 4)
    with pytest.raises(ValueError, match="the result of log_gate must have num_kv_heads \\* key=8"):
        layer(x)


def test_gradients_reach_earlier_segments_until_the_cache_is_detached():
    layer = build(use_short_conv=True)
    first, second = tokens(2, 5, 16).requires_grad_(), tokens(2, 5, 16, seed=1)
    cache = GLACache()
    layer(first, cache=cache)
    layer(second, cache=cache).sum().backward()
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    first.grad = None
    cache = GLACache()
    layer(first, cache=cache)
    cache.detach()
    result = layer(second, cache=cache)
    result.sum().backward()
    assert first.grad is None
    torch.testing.assert_close(result, layer(torch.cat([first, second], dim=1))[:, 5:])


def test_weights_start_as_published():
    torch.manual_seed(0)
    fla = GatedLinearAttention(256, 4, use_short_conv=True, conv_bias=True)
    for name, parameter in fla.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name == "norm.weight":
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    first = GatedLinearAttention(256, 4, variant="first_release")
    bound = {
        "q_proj.weight": 2**-2.5 * (6 / (256 + 128)) ** 0.5,
        "k_proj.weight": 2**-2.5 * (6 / (256 + 128)) ** 0.5,
        "log_gate.down.weight": 2**-2.5 * (6 / (256 + 16)) ** 0.5,
        "log_gate.up.weight": 2**-2.5 * (6 / (16 + 128)) ** 0.5,
    }
    for name, parameter in first.named_parameters():
        if name in bound:
            assert 0.97 * bound[name] < parameter.abs().max().item() <= bound[name], name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_new_gates_forget_slowly():
    torch.manual_seed(0)
    layer = GatedLinearAttention(64, 4)
    gate = layer.log_gate(torch.randn(2, 50, 64)).exp()
    assert gate.mean().item() == pytest.approx(0.5 ** (1 / 16), abs=0.005)


def test_bfloat16_keeps_its_memory_in_float32():
    layer = build().float()
    x = tokens(2, 40, 16).float()
    expected = layer(x)
    layer.bfloat16()
    cache = GLACache()
    with torch.no_grad():
        prompt = layer(x[:, :30].bfloat16(), cache=cache)
        steps = [layer(token, cache=cache) for token in x[:, 30:].bfloat16().split(1, dim=1)]
    actual = torch.cat([prompt, *steps], dim=1)
    assert actual.dtype == torch.bfloat16
    assert cache[0].memory.dtype == torch.float32
    error = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.02


def test_one_graph_holds_every_mask():
    layer = build(use_short_conv=True)
    x, mask = tokens(3, 8, 16), torch.tensor(MASKS["holes"])
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    for where in MASKS:
        mask = torch.tensor(MASKS[where])
        cache, cache_compiled = GLACache(), GLACache()
        torch.testing.assert_close(compiled(x, mask, cache_compiled), layer(x, mask, cache))
        torch.testing.assert_close(cache_compiled[0].memory, cache[0].memory)
        torch.testing.assert_close(cache_compiled[0].recent, cache[0].recent)
    torch.compiler.reset()


def test_it_mixes_tokens_in_the_common_language_model():
    model = MixerLM(16, 2, 11, mixer=lambda layer: GatedLinearAttention(16, 4))
    assert model(torch.randint(11, (2, 7))).shape == (2, 7, 11)
    assert model.state_size(7) == 2 * 4 * 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "num_heads": 4}, "num_heads must divide key_dim, got key_dim=15, num_heads=4"),
        ({"dim": 8, "num_heads": 4, "expand_v": 0.75}, "num_heads must divide value_dim, got value_dim=6, num_heads=4"),
        ({"dim": 16, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"dim": 16, "variant": "second_release"}, "variant must be 'fla' or 'first_release', got 'second_release'"),
        ({"dim": 16, "feature_map": "taylor"}, "feature_map must be one of relu"),
        ({"dim": 16, "gate_fn": "tanh"}, "gate_fn must be one of relu"),
        ({"dim": 16, "clamp_min": 0.5}, "clamp_min must be below zero"),
        ({"dim": 16, "gate_logit_normalizer": 0}, "normalizer must be positive"),
        ({"dim": 0}, "dim must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GatedLinearAttention(**options)


def test_masks_and_caches_that_do_not_fit_are_refused():
    layer, x = build(), tokens(2, 4, 16)
    ones = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="a recurrence cannot hide single pairs of tokens"):
        layer(x, torch.ones(2, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask must have length=4, got \\(2, 5\\)"):
        layer(x, torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask must have batch=2, got \\(3, 4\\)"):
        layer(x, torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"booleans or integers 0 and 1, got torch\.float32"):
        layer(x, ones.float())
    with pytest.raises(ValueError, match="0 at padding and 1 at real tokens, got -1"):
        layer(x, -ones)
    with pytest.raises(ValueError, match="at least one token"):
        layer(x[:, :0])
    cache = GLACache()
    layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"cache must hold a memory of \(3, 4, 2, 4\)"):
        layer(tokens(3, 4, 16), cache=cache)
    with pytest.raises(ValueError, match="length>=4"):
        layer(x, ones[:, :3], cache)
    with pytest.raises(ValueError, match=r"one state per sequence|cache must hold a memory of \(3"):
        layer(x[:1], None, cache, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="must not both be given"):
        layer(x[:1], ones[:1], None, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="rise from 0 to the length 4"):
        layer(x[:1], None, None, torch.tensor([0, 3]))
