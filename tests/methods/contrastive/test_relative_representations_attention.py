"""The relative block: what is made of the similarities, drawn anchors, subspaces, and options that do not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations import (
    RelativeAttention,
    RelativeQuantizer,
    SubspaceRelativeAttention,
)

K, D = 5, 6
LABELS = torch.tensor([0, 1, 2, 0, 1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, ANCHORS = normal(4, D), normal(K, D, seed=1)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def block(**options: Any) -> RelativeAttention:
    torch.manual_seed(0)
    return RelativeAttention(K, D, **options)


def test_maps_come_before_the_scaling_to_length_one() -> None:
    module = block(maps=("queries", "keys"), hidden_dim=3)
    assert module.query_map is not None
    assert module.key_map is not None
    assert module.query_map.bias is None
    expected = unit(X @ module.query_map.weight.T) @ unit(ANCHORS @ module.key_map.weight.T).T
    torch.testing.assert_close(module(X, ANCHORS), expected)


def test_trainable_values_are_weighted_by_the_softmax_of_the_similarities() -> None:
    module = block(values="trainable", hidden_dim=3)
    assert module.out_dim == 3
    assert module.values.detach().std() == pytest.approx(1, abs=0.4)
    expected = (unit(X) @ unit(ANCHORS).T).softmax(dim=1) @ module.values
    torch.testing.assert_close(module(X, ANCHORS), expected)


def test_anchors_as_values_turn_with_the_space() -> None:
    turn = torch.linalg.qr(normal(D, D, seed=2)).Q
    module = block(values="anchors")
    weights = (unit(X) @ unit(ANCHORS).T).softmax(dim=1)
    torch.testing.assert_close(module(X, ANCHORS), weights @ unit(ANCHORS))
    torch.testing.assert_close(module(X @ turn, ANCHORS @ turn), module(X, ANCHORS) @ turn, rtol=1e-4, atol=1e-5)
    mapped = block(values="anchors", maps=("values",), hidden_dim=3)
    assert mapped.value_map is not None
    assert mapped.out_dim == 3
    torch.testing.assert_close(mapped(X, ANCHORS), weights @ unit(ANCHORS) @ mapped.value_map.weight.T)


def test_self_attention_runs_over_the_similarities_of_one_item() -> None:
    module = block(values="self_attention", attention_dim=4, num_heads=2).eval()
    tokens = module.similarity_norm(unit(X) @ unit(ANCHORS).T)
    for row, found in zip(tokens, module(X, ANCHORS), strict=True):
        parts = [row[:, None] * part for part in (module.to_queries, module.to_keys, module.to_values)]
        attended, _ = module.self_attention(*parts)
        torch.testing.assert_close(found, module.gather(attended)[:, 0])


def test_relative_anchors_are_mixed_by_the_normalised_similarities() -> None:
    module = block(values="relative_anchors")
    weights = nn.functional.layer_norm(unit(X) @ unit(ANCHORS).T, (K,))
    torch.testing.assert_close(module(X, ANCHORS), weights @ (unit(ANCHORS) @ unit(ANCHORS).T))


def test_averages_by_class_are_quantised_behind_the_averaging() -> None:
    module = block(aggregate="class", num_classes=4, quantizer=RelativeQuantizer("round", 0.25))
    plain = unit(X) @ unit(ANCHORS).T
    means = torch.stack([plain[:, c == LABELS].mean(dim=1) for c in range(3)] + [torch.zeros(4)], dim=1)
    torch.testing.assert_close(module(X, ANCHORS, LABELS), (means / 0.25).round() * 0.25)
    encoding = module.encode(X, ANCHORS, LABELS)
    torch.testing.assert_close(encoding.unquantized, means)


def test_anchors_are_drawn_in_training_and_taken_in_turn_in_evaluation() -> None:
    options: dict[str, Any] = {"resample": "stratified", "samples_per_class": 3, "num_classes": 3}
    module = block(**options)
    torch.manual_seed(0)
    first, second = module(X, ANCHORS, LABELS), module(X, ANCHORS, LABELS)
    assert first.shape == (4, 9)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(X, ANCHORS, LABELS), module(X, ANCHORS, LABELS))
    plain = unit(X) @ unit(ANCHORS).T
    torch.testing.assert_close(module(X, ANCHORS, LABELS), plain[:, [0, 3, 0, 1, 4, 1, 2, 2, 2]])
    published = block(**options, official_quirks=True).eval()
    assert not torch.equal(published(X, ANCHORS, LABELS), published(X, ANCHORS, LABELS))


@pytest.mark.parametrize("mode", ["layernorm", "batchnorm", "instancenorm", "l2"])
def test_the_result_is_normalised(mode: Any) -> None:
    module = block(out_norm=mode)
    result, plain = module(X, ANCHORS), unit(X) @ unit(ANCHORS).T
    if mode == "l2":
        torch.testing.assert_close(result, unit(plain))
    else:
        axis = 1 if mode == "layernorm" else 0
        deviations = plain - plain.mean(dim=axis, keepdim=True)
        variance = deviations.square().mean(dim=axis, keepdim=True)
        torch.testing.assert_close(result, deviations / (variance + 1e-5).sqrt())


def test_a_decoder_s_side_reads_the_encoder_s_side_of_another_model() -> None:
    first, second = block(out_norm="layernorm"), block(out_norm="layernorm")
    assert isinstance(second.out_norm, nn.LayerNorm)
    nn.init.normal_(second.out_norm.weight)
    turn = torch.linalg.qr(normal(D, D, seed=2)).Q
    stitched = second.decode(first.encode(X @ turn, ANCHORS @ turn))
    torch.testing.assert_close(stitched, second(X, ANCHORS), rtol=1e-4, atol=1e-5)


def test_gradients_reach_anchors_only_where_they_are_asked_for() -> None:
    anchors = ANCHORS.clone().requires_grad_()
    block()(X, anchors)[0, 0].backward()
    assert anchors.grad is not None
    assert anchors.grad[0].any()
    assert not anchors.grad[1:].any()


@pytest.mark.parametrize("pool", ["concat", "sum", "mean", "max", "linear"])
def test_subspaces_are_projected_one_by_one_and_pooled(pool: Any) -> None:
    torch.manual_seed(0)
    module = SubspaceRelativeAttention(K, D, subspaces=3, pool=pool)
    parts = [unit(X[:, i : i + 2]) @ unit(ANCHORS[:, i : i + 2]).T for i in (0, 2, 4)]
    expected = {
        "concat": torch.cat(parts, dim=1),
        "sum": sum(parts),
        "mean": sum(parts) / 3,
        "max": torch.stack(parts).amax(dim=0),
    }
    if pool == "linear":
        assert module.pooling is not None
        expected["linear"] = module.pooling(expected["concat"])
    torch.testing.assert_close(module(X, ANCHORS), expected[pool])
    assert module.out_dim == expected[pool].shape[1]


def test_subspaces_are_blind_to_a_rotation_within_each() -> None:
    module = SubspaceRelativeAttention(K, D, subspaces=2)
    turn = torch.block_diag(*(torch.linalg.qr(normal(3, 3, seed=seed)).Q for seed in (2, 3)))
    torch.testing.assert_close(module(X @ turn, ANCHORS @ turn), module(X, ANCHORS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(RelativeAttention(K, D)(X, ANCHORS), module(X, ANCHORS)[:, :K], atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "dot"}, "similarity must be one of cosine, .* got 'dot'"),
        ({"normalize": False}, "normalize must be True or None for similarity='cosine'"),
        ({"values": "keys"}, "values must be one of"),
        ({"values": "trainable"}, "hidden_dim must be given for values='trainable'"),
        ({"hidden_dim": 3}, "hidden_dim is for maps and trainable values"),
        ({"maps": ("queries",), "hidden_dim": 3}, "maps must hold both 'queries' and 'keys'"),
        ({"maps": ("values",)}, "maps can hold 'values' only with values='anchors'"),
        ({"maps": ("query",)}, "maps must be distinct ones of queries, keys, values"),
        ({"values": "self_attention"}, "attention_dim and num_heads must be given"),
        ({"values": "self_attention", "attention_dim": 5, "num_heads": 2}, "num_heads must divide attention_dim"),
        ({"attention_dim": 4}, "attention_dim and num_heads are for"),
        ({"aggregate": "mean"}, "aggregate must be None or 'class'"),
        ({"aggregate": "class"}, "num_classes is for aggregate or resample and needed by them"),
        ({"num_classes": 3}, "num_classes is for aggregate or resample"),
        ({"groups": 2}, "groups needs aggregate='class'"),
        ({"aggregate": "class", "num_classes": 0}, "num_classes must be positive"),
        ({"resample": "stratified", "num_classes": 3}, "resample and samples_per_class need each other"),
        ({"resample": "all", "num_classes": 3, "samples_per_class": 2}, "resample must be None or one of"),
        (
            {"resample": "gaussian", "num_classes": 3, "samples_per_class": 2, "similarity": "basis_change"},
            "resample must be None for a basis change",
        ),
        ({"aggregate": "class", "num_classes": 3, "values": "anchors"}, "aggregate must be None for values='anchors'"),
        (
            {"resample": "gaussian", "num_classes": 3, "samples_per_class": 2, "values": "relative_anchors"},
            "resample must be None for values='relative_anchors'",
        ),
        (
            {"absolute_quantizer": RelativeQuantizer("smooth")},
            "absolute_quantizer must be of mode 'round' or 'cluster'",
        ),
        ({"out_norm": "group"}, "out_norm must be None or one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativeAttention(K, D, **options)


def test_sizes_subspaces_and_pools_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_anchors must be positive, got num_anchors=0"):
        RelativeAttention(0, D)
    with pytest.raises(ValueError, match="subspaces must divide dim, got dim=6, subspaces=4"):
        SubspaceRelativeAttention(K, D, subspaces=4)
    with pytest.raises(ValueError, match="pool must be one of concat, sum, mean, max, linear, got 'min'"):
        SubspaceRelativeAttention(K, D, subspaces=2, pool="min")  # type: ignore[arg-type]


def test_bad_tensors_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"anchors must have anchors=5"):
        block()(X, ANCHORS[:3])
    with pytest.raises(ValueError, match=r"x must have dim=6"):
        block()(X[:, :4], ANCHORS)
    with pytest.raises(TypeError, match=r"anchors must have the module's dtype torch.float32"):
        block()(X, ANCHORS.double())
    averages = block(aggregate="class", num_classes=3)
    with pytest.raises(ValueError, match="anchor_labels must be given"):
        averages(X, ANCHORS)
    with pytest.raises(ValueError, match=r"anchor_labels must lie in \[0, 3\), got values from 0 to 4"):
        averages(X, ANCHORS, torch.arange(5))
    drawing = block(resample="stratified", samples_per_class=1, num_classes=4)
    with pytest.raises(ValueError, match=r"anchor_labels must hold every class .* got none of \[3\]"):
        drawing(X, ANCHORS, LABELS)
    with pytest.raises(ValueError, match="similarities must have relative=3"):
        averages.decode(block().encode(X, ANCHORS))


def test_clusters_are_refused_in_training_mode() -> None:
    clusters = RelativeQuantizer("cluster", cluster_threshold=1.0)
    for options in ({"quantizer": clusters}, {"absolute_quantizer": clusters}):
        module = block(**options)
        with pytest.raises(RuntimeError, match=r"clusters depend on the batch .* call eval\(\) first"):
            module(X, ANCHORS)
        assert module.eval()(X, ANCHORS).shape == (4, K)
