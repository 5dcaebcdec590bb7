"""Pictures of shapes, and the codec of their patches."""

from __future__ import annotations

import pytest
import torch

from headgate.data.patch_codecs import PatchPCA
from headgate.data.shape_pictures import SHAPE_NAMES, draw_shape, shape_pictures


def test_pictures_are_a_function_of_their_arguments():
    one, same = shape_pictures(20, 3), shape_pictures(20, 3)
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.label, same.label)
    assert not torch.equal(one.images, shape_pictures(20, 4).images)
    assert not torch.equal(one.images, shape_pictures(20, 3, split="test").images)
    assert not torch.equal(one.images, shape_pictures(20, 3, "jitter").images)
    one = shape_pictures(12, 3)
    assert one.label.tolist() == [12, 4, 12, 7, 8, 6, 1, 12, 3, 2, 6, 1]
    assert one.quadrant.tolist() == [2, 2, 3, 0, 3, 0, 0, 2, 1, 2, 3, 1]
    assert one.size.tolist() == [1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("preset", ["large", "jitter"])
def test_pictures_show_what_their_labels_say(preset):
    pictures = shape_pictures(400, 0, preset)
    assert pictures.images.shape == (400, 3, 32, 32)
    assert float(pictures.images.min()) >= -1
    assert float(pictures.images.max()) <= 1
    assert torch.equal(pictures.label, 4 * pictures.shape + pictures.colour)
    for attribute, count in ((pictures.shape, 4), (pictures.colour, 4), (pictures.size, 2), (pictures.quadrant, 4)):
        assert attribute.bincount(minlength=count).min() > 0.6 * 400 / count
    # A shape's colour stands out against what is typical: the redder the object, the redder the picture.
    redness = (pictures.images[:, 0] - pictures.images[:, 2]).mean(dim=(1, 2))
    assert redness[pictures.colour == 0].mean() > redness[pictures.colour == 2].mean() + 0.1


def test_shapes_cover_the_area_of_their_formula():
    shape = torch.arange(4)
    cover = draw_shape(shape, torch.full((4, 2), 16.0), torch.full((4,), 8.0), torch.zeros(4))
    area = dict(zip(SHAPE_NAMES, cover.sum(dim=(1, 2)).tolist(), strict=True))
    assert area["circle"] == pytest.approx(3.14159 * 64, rel=0.02)
    assert area["square"] == pytest.approx((2 * 0.85 * 8) ** 2, rel=0.03)
    arm, half = 2 * 1.05 * 8, 2 * 0.36 * 8
    assert area["cross"] == pytest.approx(2 * arm * half - half**2, rel=0.05)
    side = 0.55 * 8 * 6 / 3**0.5
    assert area["triangle"] == pytest.approx(side**2 * 3**0.5 / 4, rel=0.05)
    assert cover[:, 16, 16].tolist() == [1, 1, 1, 1]


def test_a_turn_by_a_right_angle_maps_a_square_onto_itself_and_not_a_triangle():
    centre, radius = torch.full((2, 2), 16.0), torch.full((2,), 8.0)
    shape = torch.tensor([1, 2])
    straight = draw_shape(shape, centre, radius, torch.zeros(2))
    turned = draw_shape(shape, centre, radius, torch.full((2,), torch.pi / 2))
    torch.testing.assert_close(straight[0], turned[0], atol=1e-4, rtol=0)
    assert (straight[1] - turned[1]).abs().max() > 0.5


def test_quadrants_are_those_of_the_centre():
    pictures = shape_pictures(300, 1, "jitter")
    left = pictures.quadrant % 2 == 0
    shown = (pictures.images.amax(dim=1) - pictures.images.amin(dim=1)).clamp(min=0.5) - 0.5
    middle = (shown * (torch.arange(32) + 0.5)).sum(dim=(1, 2)) / shown.sum(dim=(1, 2)).clamp(min=1e-6)
    bright = shown.sum(dim=(1, 2)) > 20
    agree = ((middle < 16) == left)[bright].double().mean()
    assert agree > 0.85


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="preset"):
        shape_pictures(1, 0, "tiny")
    with pytest.raises(ValueError, match="count"):
        shape_pictures(0, 0)


def test_all_components_give_the_image_back():
    images = shape_pictures(300, 0).images
    codec = PatchPCA(images, 4, 48)
    torch.testing.assert_close(codec.decode(codec.encode(images[:5])), images[:5], atol=1e-4, rtol=0)


def test_eight_components_keep_most_and_are_half_whitened():
    images = shape_pictures(2000, 0).images
    codec = PatchPCA(images)
    latents = codec.encode(images)
    assert latents.shape == (2000, 8, 8, 8)
    assert float((codec.decode(latents) - images).square().mean()) < 0.02
    deviations = latents.transpose(0, 1).flatten(1).double().std(dim=1)
    raw = deviations * codec.scale
    wanted = (raw / raw.mean()).sqrt() / 1.3
    torch.testing.assert_close(deviations, wanted, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="channels"):
        PatchPCA(images, 4, 49)
    with pytest.raises(ValueError, match="height"):
        codec.encode(torch.zeros(1, 3, 30, 32))
