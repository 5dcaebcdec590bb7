"""The mixers of Zoology against their definitions, causality, state, and the model built around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.methods.sequence.zoology import (
    H3,
    BaseConv,
    Based,
    HybridMixer,
    Hyena,
    RecallLoss,
    Retention,
    RWKVChannelMix,
    RWKVTimeMix,
    SparseLookups,
    recall_accuracy,
    recall_perplexity,
    zoology_model,
)
from headgate.methods.sequence.zoology.feature_maps import FEATURE_MAPS
from headgate.methods.sequence.zoology.h3 import DiagonalKernel, ShiftKernel
from headgate.methods.sequence.zoology.models import MIXERS
from headgate.methods.sequence.zoology.rwkv import wkv, wkv_reference
from headgate.nn import MultiHeadAttention, apply_rotary
from headgate.ops import long_convolution

DIM, LENGTH = 8, 12
CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "base_conv": lambda: BaseConv(DIM, LENGTH),
    "base_conv_long": lambda: BaseConv(DIM, LENGTH, -1),
    "base_conv_explicit": lambda: BaseConv(DIM, 2 * LENGTH, -1, implicit=False),
    "hyena": lambda: Hyena(DIM, LENGTH),
    "h3": lambda: H3(DIM, 6, 2, LENGTH),
    "rwkv_time": lambda: RWKVTimeMix(DIM, 1, 4),
    "rwkv_channel": lambda: RWKVChannelMix(DIM, 1, 4),
    "retention": lambda: Retention(DIM, 2),
    "based": lambda: Based(DIM, 2, 4),
    "based_chunked": lambda: Based(DIM, 2, 4, chunk_size=5),
    "lookups_prefix": lambda: SparseLookups(DIM, selection="prefix"),
    "lookups_threshold": lambda: SparseLookups(DIM, selection="threshold"),
}


def draw(length: int = LENGTH, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CAUSAL[name]().double().eval()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_past_does_not_depend_on_the_future(name: str) -> None:
    mixer, x = build(name), draw()
    changed = torch.cat((x[:, :7], 3 * draw(seed=1)[:, 7:]), dim=1)
    y, other = mixer(x), mixer(changed)
    torch.testing.assert_close(y[:, :7], other[:, :7])
    assert not torch.allclose(y[:, 7:], other[:, 7:])


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_alone_gives_what_it_gives_within_the_sequence(name: str) -> None:
    mixer, x = build(name), draw()
    for length in (1, 5, 11):
        torch.testing.assert_close(mixer(x[:, :length]), mixer(x)[:, :length])


@pytest.mark.parametrize("name", ["base_conv_long", "base_conv_explicit", "hyena", "h3"])
def test_a_sequence_beyond_the_longest_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="max_length"):
        build(name)(torch.zeros(1, 2 * LENGTH + 1, DIM, dtype=torch.float64))


def test_base_conv_is_a_gated_convolution_with_its_skips() -> None:
    torch.manual_seed(0)
    x = draw()
    short = BaseConv(DIM, LENGTH, 3).double()
    torch.testing.assert_close(short(x), short.conv(x) * short.projection(x) + x)
    for implicit in (True, False):
        layer = BaseConv(DIM, LENGTH, -1, implicit=implicit, activation=True).double()
        kernel = layer.conv.filter(layer.conv.features).T if implicit else layer.conv.kernel
        mixed = x + long_convolution(x, kernel, backend="reference")
        torch.testing.assert_close(layer(x), F.silu(mixed) * F.silu(layer.projection(x)) + x)


def test_the_published_wrap_around_is_a_circular_convolution_and_off_by_default() -> None:
    torch.manual_seed(0)
    x = draw()
    quirky = BaseConv(DIM, 20, -1, implicit=False, official_quirks=True).double()
    spectrum = torch.fft.rfft(x, n=24, dim=1) * torch.fft.rfft(quirky.conv.kernel.T, n=24, dim=0)
    circular = torch.fft.irfft(spectrum, n=24, dim=1)[:, :LENGTH]
    torch.testing.assert_close(quirky.conv(x), x + circular)
    sound = BaseConv(DIM, 20, -1, implicit=False).double()
    sound.load_state_dict(quirky.state_dict())
    torch.testing.assert_close(sound.conv(x), x + long_convolution(x, quirky.conv.kernel, backend="reference"))
    assert not torch.allclose(sound(x), quirky(x))
    whole = torch.cat((x, draw(8, seed=2)), dim=1)
    torch.testing.assert_close(sound(whole), quirky(whole))


def test_hyena_is_two_gates_around_its_long_convolution() -> None:
    torch.manual_seed(0)
    layer, x = Hyena(DIM, LENGTH, filter_dim=6, decay_shift=0.1).double(), draw()
    x1, x2, v = layer.short_conv(layer.in_proj(x)).split(DIM, dim=-1)
    filter = layer.filter
    hidden = filter.features
    for linear in filter.layers[:-1]:
        hidden = torch.sin(filter.frequency * linear(hidden))
    time = torch.linspace(0, 1, LENGTH, dtype=torch.float64)[:, None]
    rates = torch.linspace(torch.tensor(0.01).log() / 1.5, torch.tensor(0.01).log() / 0.3, DIM).double()
    kernel = (filter.layers[-1](hidden) * (torch.exp(time * rates) + 0.1)).T
    mixed = long_convolution(v * x1, kernel, filter.skip, backend="reference")
    torch.testing.assert_close(layer(x), layer.out_proj(mixed * x2), rtol=1e-5, atol=1e-7)


def test_the_diagonal_kernel_is_the_recurrence_of_its_modes() -> None:
    torch.manual_seed(0)
    kernel = DiagonalKernel(3, 8).double()
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        dt = kernel.log_dt.exp()[:, None]
        a = torch.complex(-kernel.log_decay.exp(), kernel.frequency)
        step = (1 + dt * a / 2) / (1 - dt * a / 2)
        b, c = torch.view_as_complex(kernel.input), torch.view_as_complex(kernel.readout)
        state = b * dt / (1 - dt * a / 2)
        taps = []
        for _ in range(30):
            taps.append(2 * (c * state).sum(1).real)
            state = step * state
        torch.testing.assert_close(kernel(30), torch.stack(taps, dim=1))


def test_the_shift_kernel_correlates_input_and_readout() -> None:
    torch.manual_seed(0)
    kernel = ShiftKernel(2, 4).double()
    assert torch.equal(kernel.input.detach(), torch.eye(4, dtype=torch.float64)[:1].expand(2, 4))
    nn.init.normal_(kernel.input)
    b, c = kernel.input.detach(), kernel.readout.detach()
    expected = torch.stack([(b[:, : 4 - lag] * c[:, lag:]).sum(1) for lag in range(4)], dim=1)
    torch.testing.assert_close(kernel(9), expected)
    torch.testing.assert_close(kernel(3), expected[:, :3])


def test_h3_is_its_sum_over_products_of_keys_and_values() -> None:
    torch.manual_seed(0)
    layer, x = H3(DIM, 6, 2, LENGTH).double(), draw()
    key = long_convolution(layer.key(x), layer.key_kernel(LENGTH), layer.key_skip, backend="reference")
    query, value, kernel = layer.query(x), layer.value(x), layer.kernel(LENGTH)
    mixed = torch.zeros(2, LENGTH, 2, DIM // 2, dtype=torch.float64)
    for group in range(DIM // 2):
        for a in range(2):
            for b in range(2):
                product = (key[..., 2 * group + a] * value[..., 2 * group + b])[..., None]
                memory = long_convolution(product, kernel[group : group + 1], layer.skip[group : group + 1])
                mixed[:, :, b, group] += query[..., 2 * group + a] * memory[..., 0]
    torch.testing.assert_close(layer(x), layer.output(mixed.flatten(2)))


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_the_decaying_average_is_its_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, 5), (2, length, 5), (5,), (5,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[2] = inputs[2].exp()
    inputs = [part.requires_grad_() for part in inputs]
    weight = torch.randn(2, length, 5, generator=generator, dtype=torch.float64)
    results = []
    for form in (wkv, wkv_reference):
        y = form(*inputs)
        gradients = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
        results.append((y, *(torch.zeros(()) if g is None else g for g in gradients)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected.expand_as(ours).to(ours.dtype))


def test_the_decaying_average_by_hand() -> None:
    key, value = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[[1.0], [10.0], [100.0]]])
    decay, bonus = torch.tensor([0.5]), torch.tensor([0.3])
    e = torch.exp
    w = [e(torch.tensor(-0.5)), e(torch.tensor(1.0)), e(torch.tensor(2.3))]  # e^{-w + k0}, e^{k1}, e^{u + k2}
    third = (w[0] * 1 + w[1] * 10 + w[2] * 100) / sum(w)
    own = e(torch.tensor(1.3))
    second = (1 + own * 10) / (1 + own)
    torch.testing.assert_close(wkv(key, value, decay, bonus)[0, :, 0], torch.stack((torch.tensor(1.0), second, third)))


def test_extreme_exponents_do_not_overflow() -> None:
    key = torch.tensor([300.0, -300.0, 0.0, 1e4, -1e4]).view(1, 5, 1).requires_grad_()
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 5, 1)
    y = wkv(key, value, torch.tensor([1e-3]), torch.tensor([0.0]))
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0]))
    y.sum().backward()
    assert key.grad is not None
    assert key.grad.isfinite().all()
    forgetful = wkv(key.detach() * 0, value, torch.tensor([1e4]), torch.tensor([-1e4]))
    torch.testing.assert_close(forgetful.flatten(), torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0]))


def test_rwkv_mixes_as_published() -> None:
    torch.manual_seed(0)
    x = draw()
    time, channel = RWKVTimeMix(DIM, 2, 4).double(), RWKVChannelMix(DIM, 2, 4).double()
    before = torch.cat((torch.zeros(2, 1, DIM, dtype=torch.float64), x[:, :-1]), dim=1)

    def shifted(mix: Tensor) -> Tensor:
        return mix * x + (1 - mix) * before

    average = wkv_reference(
        time.key(shifted(time.mix_key)), time.value(shifted(time.mix_value)), time.log_decay.exp(), time.bonus
    )
    gate = torch.sigmoid(time.receptance(shifted(time.mix_receptance)))
    torch.testing.assert_close(time(x), time.output(gate * average))
    key = channel.key(shifted(channel.mix_key)).relu().square()
    gate = torch.sigmoid(channel.receptance(shifted(channel.mix_receptance)))
    torch.testing.assert_close(channel(x), gate * channel.value(key))


def test_rwkv_starts_as_published() -> None:
    layer = RWKVTimeMix(4, layer=1, depth=3)
    # ratio 0 to 1: 1/2; ratio 1 to almost 0: 2/3
    place = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(layer.log_decay.detach(), -5 + 8 * (place / 3) ** 1.35)
    torch.testing.assert_close(layer.bonus.detach(), torch.log(torch.tensor(0.3)) + torch.tensor([0.0, 0.5, -0.5, 0.0]))
    torch.testing.assert_close(layer.mix_key.detach(), (place / 4) ** (2 / 3))
    torch.testing.assert_close(layer.mix_value.detach(), (place / 4) ** (2 / 3) + 0.15)
    torch.testing.assert_close(layer.mix_receptance.detach(), (place / 4) ** (1 / 3))
    with pytest.raises(ValueError, match=r"layer must lie in \[0, depth\)"):
        RWKVTimeMix(4, layer=3, depth=3)


@pytest.mark.parametrize("heads", [1, 2])
def test_retention_gives_the_same_token_by_token(heads: int) -> None:
    torch.manual_seed(0)
    layer, x = Retention(DIM, heads).double(), draw()
    state, tokens = None, []
    for position in range(LENGTH):
        y, state = layer.step(x[:, position], state, position)
        tokens.append(y)
    torch.testing.assert_close(layer(x), torch.stack(tokens, dim=1))
    assert state is not None
    assert state[0].numel() == layer.state_size(LENGTH)


def test_retention_is_its_gated_and_normed_sum() -> None:
    torch.manual_seed(0)
    layer, x = Retention(DIM, 2, value_dim=12).double(), draw()
    q = apply_rotary(layer.query(x).view(2, LENGTH, 2, 4).transpose(1, 2))
    k = apply_rotary(layer.key(x).view(2, LENGTH, 2, 4).transpose(1, 2)) / 2
    v = layer.value(x).view(2, LENGTH, 2, 6).transpose(1, 2)
    retained = torch.zeros(2, LENGTH, 2, 6, dtype=torch.float64)
    for head, gamma in enumerate((1 - 2**-5, 1 - 2**-6)):
        for t in range(LENGTH):
            for i in range(t + 1):
                product = (q[:, head, t] * k[:, head, i]).sum(-1, keepdim=True)
                retained[:, t, head] += gamma ** (t - i) * product * v[:, head, i]
    normed = F.group_norm(retained.view(2 * LENGTH, 12), 2, eps=1e-5).view(2, LENGTH, 12)
    torch.testing.assert_close(layer(x), layer.output(F.silu(layer.gate(x)) * normed))


def test_retention_decays_by_its_published_rates() -> None:
    torch.manual_seed(0)
    layer = Retention(DIM, 4, rotary_base=1.0).double()
    state = torch.ones(1, 4, 2, 4, dtype=torch.float64)
    nn.init.zeros_(layer.key.weight)
    _, after = layer.step(draw()[:1, 0], state)
    expected = torch.tensor([1 - 2**-5, 1 - 2**-6, 1 - 2**-7, 1 - 2**-8], dtype=torch.float64)
    torch.testing.assert_close(after, expected.view(1, 4, 1, 1).expand_as(after))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_give_their_products(name: str) -> None:
    feature_map = FEATURE_MAPS[name]
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(feature_map.expand(q) @ feature_map.expand(k).T, feature_map.product(q, k))
    assert feature_map.expand(q).shape[-1] == feature_map.size(6)
    if name == "taylor":
        s = q @ k.T / 6**0.5
        torch.testing.assert_close(feature_map.product(q, k), 1 + s + s**2 / 2)
        assert feature_map.product(100 * q, -100 * q).min() >= 0.5


@pytest.mark.parametrize(("feature_map", "base"), [("taylor", None), ("elu", None), ("taylor", 50.0)])
def test_based_is_its_weighted_mean(feature_map: str, base: float | None) -> None:
    torch.manual_seed(0)
    layer, x = Based(DIM, 4, 2, 2, feature_map=feature_map, rotary_base=base).double(), draw()
    q = layer.query(x).view(2, LENGTH, 4, 2)
    k = layer.key(x).view(2, LENGTH, 2, 2)
    if base is not None:
        q, k = (apply_rotary(part.transpose(1, 2), base).transpose(1, 2) for part in (q, k))
    v = layer.value(x).view(2, LENGTH, 2, 4)
    heads = []
    for head in range(4):
        shared = head // 2
        weights = layer.feature_map.product(q[:, :, head], k[:, :, shared])
        mixed = [
            (weights[:, t, : t + 1, None] * v[:, : t + 1, shared]).sum(1) / weights[:, t, : t + 1].sum(1, keepdim=True)
            for t in range(LENGTH)
        ]
        heads.append(torch.stack(mixed, dim=1))
    torch.testing.assert_close(layer(x), layer.output(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 64])
def test_based_does_not_depend_on_the_chunks(chunk_size: int) -> None:
    torch.manual_seed(0)
    layer = Based(DIM, 2, 4, rotary_base=50.0).double()
    x = draw().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.chunk_size = chunk_size
    (actual,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_a_hybrid_takes_one_mixer_per_block_in_turn() -> None:
    mixers = [lambda: BaseConv(DIM, LENGTH), lambda: MultiHeadAttention(DIM, causal=True), lambda: SparseLookups(DIM)]
    kinds = [type(HybridMixer(mixers, layer).mixer) for layer in range(5)]
    assert kinds == [BaseConv, MultiHeadAttention, SparseLookups, BaseConv, MultiHeadAttention]
    hybrid = HybridMixer(mixers, 1)
    x = draw().float()
    assert torch.equal(hybrid(x), hybrid.mixer(x))
    assert hybrid.state_size(10) == 2 * 10 * DIM
    assert HybridMixer([nn.Identity], 0).state_size(10) is None
    assert [HybridMixer(mixers, layer).has_aux_loss for layer in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match="at least one"):
        HybridMixer([], 0)


def test_state_sizes_are_those_of_the_published_table() -> None:
    assert BaseConv(DIM, 50).state_size(50) == DIM * 3
    assert BaseConv(DIM, 50, -1).state_size(50) == DIM * 50
    assert Hyena(DIM, 50).state_size(50) == DIM * 50
    assert H3(DIM, 10).state_size(50) == DIM * 10
    # one value of d/H channels and a normaliser per head, for 1 + f + f(f + 1)/2 features
    assert Based(DIM, 2, 6).state_size(50) == 2 * (4 + 1) * (1 + 6 + 21)
    assert SparseLookups(DIM).state_size(50) == 2 * 50 * DIM


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_published_model_learns_a_little(mixer: str) -> None:
    torch.manual_seed(0)
    model = zoology_model(mixer, 8, 16, 20)
    tokens = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        logits, aux_loss = model(tokens, return_aux=True)
        loss = RecallLoss()(logits, tokens) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert isinstance(model.state_size(16), int)
    assert (model.positions is not None) == (mixer == "attention")


def test_models_of_the_grid_alternate_as_published() -> None:
    model = zoology_model("base_conv", 8, 16, 20, depth=4)
    assert [block.mixer.state_size(16) for block in model.blocks] == [8 * 3, 8 * 16, 8 * 3, 8 * 16]
    model = zoology_model("based", 8, 16, 20, depth=2)
    assert [type(block.mixer.mixer) for block in model.blocks] == [BaseConv, Based]
    assert zoology_model("attention", 8, 16, 20, num_heads=2, mlp_ratio=4).blocks[0].state_mixer.fc1.out_features == 32
    with pytest.raises(ValueError, match="mixer must be one of attention"):
        zoology_model("mamba")
    with pytest.raises(ValueError, match="num_heads is an option of the mixer 'attention'"):
        zoology_model("hyena", num_heads=2)


def test_the_loss_looks_at_labelled_positions_alone() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, -100, 4], [-100, -100, 0]])
    chosen = [-logits[i, j].log_softmax(-1)[labels[i, j]] for i, j in ((0, 0), (0, 2), (1, 2))]
    torch.testing.assert_close(RecallLoss()(logits, labels), torch.stack(chosen).mean())
    torch.testing.assert_close(RecallLoss("sum")(logits, labels), torch.stack(chosen).sum())
    expected = torch.zeros(2, 3)
    expected[0, 0], expected[0, 2], expected[1, 2] = chosen
    torch.testing.assert_close(RecallLoss("none")(logits, labels), expected)
    nothing = RecallLoss()(logits, torch.full_like(labels, -100))
    assert nothing == 0
    nothing.backward()
    assert (logits.grad == 0).all()
    with pytest.raises(ValueError, match="reduction"):
        RecallLoss("median")  # type: ignore[arg-type]


def test_accuracy_counts_labelled_positions() -> None:
    logits = F.one_hot(torch.tensor([[1, 2, 3], [0, 0, 0]]), 5).float()
    assert recall_accuracy(logits, torch.tensor([[1, -100, 4], [-100, -100, 0]])) == pytest.approx(2 / 3)
    assert recall_accuracy(logits, torch.full((2, 3), -100)) != recall_accuracy(logits, torch.full((2, 3), -100))


def test_perplexity_is_split_by_what_the_context_holds() -> None:
    tokens = torch.tensor([[1, 2, 1, 2, 3]])
    logits = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    losses = [-logits[0, t].log_softmax(-1)[tokens[0, t + 1]].item() for t in range(4)]
    parts = recall_perplexity(logits, tokens)
    # Of the targets 2, 1, 2, 3 only the third, the second 2 behind a 1, repeats a bigram.
    expected = {"all": losses, "recall": losses[2:3], "other": losses[:2] + losses[3:]}
    for name, group in expected.items():
        assert parts[name] == pytest.approx(torch.tensor(group).mean().exp().item())
    rare = recall_perplexity(logits, tokens, frequent_bigrams=torch.tensor([[1, 2]]))
    assert rare["recall"] != rare["recall"]
    assert rare["other"] == pytest.approx(parts["all"])
    split = recall_perplexity(logits, tokens, document_ids=torch.tensor([[0, 0, 1, 1, 1]]))
    assert split["recall"] != split["recall"]
    with pytest.raises(ValueError, match="tokens must have length=5"):
        recall_perplexity(logits, tokens[:, :4])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BaseConv(8, 8, 0), "kernel_size must be positive, or -1"),
        (lambda: Hyena(8, 8, num_features=4), "num_features must be odd"),
        (lambda: H3(8, 7), "state_dim must be even"),
        (lambda: H3(8, 8, 3), "head_dim must divide dim"),
        (lambda: Retention(6, 2), "even head size"),
        (lambda: Based(8, 3, 4, 2), "num_kv_heads must divide num_heads"),
        (lambda: Based(8, feature_map="softmax"), "feature_map must be one of taylor"),
        (lambda: Based(8, feature_dim=3, rotary_base=10.0), "feature_dim must be even"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
