"""Nested classifiers, their gradients, the language-model form and the paper's model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headgate.methods.contrastive.matryoshka import (
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMaskedLM,
    MatryoshkaResNet,
    nested_dims,
)
from headgate.methods.contrastive.matryoshka.head import nested_logits

DIMS = (2, 4, 8)


def embeddings(batch: int = 5, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 5, classes: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))


def test_logits_at_each_size_are_a_linear_map_of_the_prefix() -> None:
    head = MatryoshkaHead(DIMS, 3)
    z = embeddings()
    for index, (size, logits) in enumerate(zip(DIMS, head(z), strict=True)):
        layer = head.get_submodule(f"nesting_classifier_{index}")
        torch.testing.assert_close(logits, z[:, :size] @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_tied_logits_use_one_matrix_and_one_bias_at_every_size(bias: bool) -> None:
    head = MatryoshkaHead(DIMS, 3, tied=True, bias=bias)
    assert [name for name, _ in head.named_parameters()] == [
        f"nesting_classifier_0.{part}" for part in (("weight", "bias") if bias else ("weight",))
    ]
    z = embeddings()
    layer = head.get_submodule("nesting_classifier_0")
    for size, logits in zip(DIMS, head(z), strict=True):
        expected = F.linear(z[:, :size], layer.weight[:, :size], layer.bias)
        torch.testing.assert_close(logits, expected)


def test_half_precision_partial_sums_round_once_not_at_every_block() -> None:
    # Each of 512 blocks adds 2^-9 to 1: in bfloat16 alone every such addition would be rounded away.
    dims = tuple(range(1, 514))
    z = torch.ones(1, 513, dtype=torch.bfloat16)
    weight = torch.full((1, 513), 2.0**-9, dtype=torch.bfloat16)
    weight[0, 0] = 1
    logits = nested_logits(z, weight, None, dims)
    assert logits[-1].item() == 2.0
    assert logits[-1].dtype == torch.bfloat16


def test_float64_sums_stay_in_float64() -> None:
    head = MatryoshkaHead(DIMS, 3, tied=True, dtype=torch.float64)
    z = embeddings().double()
    layer = head.get_submodule("nesting_classifier_0")
    torch.testing.assert_close(head(z)[-1], F.linear(z, layer.weight, layer.bias), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("tied", [False, True])
def test_coordinate_j_gets_its_gradient_from_the_sizes_above_j_only(tied: bool) -> None:
    head = MatryoshkaHead(DIMS, 3, tied=tied)
    z, target = embeddings().requires_grad_(), labels()
    for size, logits in zip(DIMS, head(z), strict=True):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), z, retain_graph=True)
        assert (gradient[:, :size] != 0).all()
        assert (gradient[:, size:] == 0).all()


def test_tied_weight_columns_get_their_gradient_from_the_sizes_above_them_only() -> None:
    head = MatryoshkaHead(DIMS, 3, tied=True)
    z, target = embeddings(), labels()
    weight = head.get_submodule("nesting_classifier_0").weight
    total = torch.zeros_like(weight)
    for size, logits in zip(DIMS, head(z), strict=True):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), weight, retain_graph=True)
        assert (gradient[:, size:] == 0).all()
        total += gradient
    (full,) = torch.autograd.grad(MatryoshkaLoss(DIMS)(head(z), target), weight)
    torch.testing.assert_close(full, total)


def test_a_zero_weight_takes_a_size_out_of_the_gradient() -> None:
    head = MatryoshkaHead(DIMS, 3)
    z, target = embeddings().requires_grad_(), labels()
    MatryoshkaLoss(dims=DIMS, weights=(1.0, 1.0, 0.0))(head(z), target).backward()
    assert z.grad is not None
    assert (z.grad[:, :4] != 0).all()
    assert (z.grad[:, 4:] == 0).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_classifier_of_one_size_gives_that_size_s_logits(tied: bool, bias: bool) -> None:
    head = MatryoshkaHead(DIMS, 3, tied=tied, bias=bias)
    z = embeddings()
    for size, logits in zip(DIMS, head(z), strict=True):
        torch.testing.assert_close(head.classifier(size)(z[:, :size]), logits)


def test_classifier_of_one_size_is_trainable_and_draws_no_random_numbers() -> None:
    head = MatryoshkaHead(DIMS, 3)
    before = torch.get_rng_state()
    layer = head.classifier(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_classifier_is_a_copy_and_exists_for_trained_sizes_only() -> None:
    head = MatryoshkaHead(DIMS, 3)
    with torch.no_grad():
        head.classifier(4).weight.zero_()
    assert head.get_submodule("nesting_classifier_1").weight.abs().sum() > 0
    with pytest.raises(ValueError, match=r"dim must be one of \[2, 4, 8\], got 3"):
        head.classifier(3)


def test_reset_parameters_draws_the_initial_weights_again() -> None:
    torch.manual_seed(3)
    head = MatryoshkaHead(DIMS, 3)
    before = [parameter.clone() for parameter in head.parameters()]
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    head.reset_parameters()
    for old, new in zip(before, head.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ((), ValueError, "at least one size"),
        ((4, 4, 8), ValueError, "strictly increasing"),
        ((8, 4), ValueError, "strictly increasing"),
        ((0, 4), ValueError, "at least 1"),
        ((2.0, 4.0), TypeError, "integers"),
        ((True, 4), TypeError, "integers"),
        (8, TypeError, "sequence of integers, got int"),
    ],
)
def test_a_wrong_nesting_set_is_refused(dims: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MatryoshkaHead(dims, 3)  # type: ignore[arg-type]


def test_the_embedding_must_have_the_last_size() -> None:
    head = MatryoshkaHead(DIMS, 3)
    for wrong in (7, 9):
        with pytest.raises(ValueError, match="z must have dim=8"):
            head(embeddings(dim=wrong))
    with pytest.raises(ValueError, match="num_classes must be positive"):
        MatryoshkaHead(DIMS, 0)


def test_nested_dims_halves_from_the_full_size_to_the_smallest() -> None:
    assert nested_dims(2048) == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert nested_dims(768) == (12, 24, 48, 96, 192, 384, 768)
    assert nested_dims(64, smallest=2) == (2, 4, 8, 16, 32, 64)
    assert nested_dims(5, smallest=5) == (5,)
    with pytest.raises(ValueError, match=r"smallest must lie in \[1, dim\]"):
        nested_dims(4)


def test_language_model_logits_are_the_prefix_times_the_prefix_of_the_token_embedding() -> None:
    embedding = nn.Embedding(11, 8)
    model = MatryoshkaMaskedLM(embedding, DIMS)
    assert model.vocabulary is embedding
    assert model.bias is not None
    with torch.no_grad():
        model.bias.normal_()
    hidden = embeddings(6).reshape(2, 3, 8)
    for size, logits in zip(DIMS, model(hidden), strict=True):
        expected = hidden[..., :size] @ embedding.weight[:, :size].T + model.bias
        torch.testing.assert_close(logits, expected)


def test_language_model_loss_is_the_cross_entropy_at_labelled_positions_summed_over_sizes() -> None:
    model = MatryoshkaMaskedLM(11, DIMS, weights=(1.0, 2.0, 0.5))
    hidden = embeddings(6).reshape(2, 3, 8)
    marked = torch.tensor([[-100, 4, -100], [10, -100, 0]])
    expected = sum(
        weight * F.cross_entropy(logits.flatten(0, 1), marked.flatten(), ignore_index=-100)
        for weight, logits in zip((1.0, 2.0, 0.5), model(hidden), strict=True)
    )
    torch.testing.assert_close(model.loss(hidden, marked), expected)


def test_language_model_loss_without_labels_is_zero_and_differentiable() -> None:
    model = MatryoshkaMaskedLM(11, DIMS)
    loss = model.loss(embeddings(6).reshape(2, 3, 8), torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert model.vocabulary.weight.grad is not None
    assert (model.vocabulary.weight.grad == 0).all()


def test_language_model_refuses_an_embedding_of_another_size_and_bad_labels() -> None:
    with pytest.raises(ValueError, match="dims must end with the embedding's size 8"):
        MatryoshkaMaskedLM(nn.Embedding(11, 8), (2, 4))
    model = MatryoshkaMaskedLM(11, DIMS)
    hidden = embeddings(6).reshape(2, 3, 8)
    with pytest.raises(ValueError, match="labels"):
        model.loss(hidden, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels"):
        model.loss(hidden, torch.zeros(2, 3))


def test_paper_model_has_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        models = MatryoshkaResNet(), MatryoshkaResNet(tied=True)
    backbone = 23_508_032
    head = 1000 * (8 + 16 + 32 + 64 + 128 + 256 + 512 + 1024 + 2048) + 9 * 1000
    assert head == 4_097_000
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == [backbone + head, backbone + 1000 * 2048 + 1000]


def test_paper_model_embeds_into_its_head_s_size_and_blurs_strided_convolutions() -> None:
    model = MatryoshkaResNet(5, layers=(1, 2, 1, 1), width=4).eval()
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(images)
    assert features.shape == (2, 128)
    assert model.dims == (8, 16, 32, 64, 128)
    for logits, again in zip(model(images), model.fc(features), strict=True):
        torch.testing.assert_close(logits, again)
    blurred = [name.removesuffix(".blur_filter") for name, _ in model.named_buffers() if name.endswith("blur_filter")]
    # The stem has 3 input channels and the first strided convolution (4 × 4 = 16 in the shortcut, 8 in the branch).
    assert blurred == [
        "layer2.0.downsample.0",
        "layer3.0.conv2",
        "layer3.0.downsample.0",
        "layer4.0.conv2",
        "layer4.0.downsample.0",
    ]
    kernel = model.get_buffer("layer3.0.conv2.blur_filter")
    assert kernel.shape == (16, 1, 3, 3)
    torch.testing.assert_close(kernel[3, 0] * 16, torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))


def test_paper_model_refuses_a_nesting_set_that_does_not_end_at_its_features() -> None:
    with pytest.raises(ValueError, match="dims must end with the 128 features"):
        MatryoshkaResNet(5, (8, 64), layers=(1, 1, 1, 1), width=4)
    with pytest.raises(ValueError, match="four stages"):
        MatryoshkaResNet(5, layers=(1, 1, 1), width=4)
