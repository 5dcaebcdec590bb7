"""The world: its grid, its settings and its renderer."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headgate.data.scenes import MultiObject, World
from headgate.data.scenes.atlas import DARKENING, SUBSAMPLES
from headgate.data.scenes.palette import ground_rgb, object_rgb
from headgate.data.scenes.shapes import SHAPES, signed_distance, texture_distance
from headgate.data.seeding import stream_generator


def random_factors(world: World, batch: int, objects: int, seed: int = 0) -> dict[str, Tensor]:
    generator = stream_generator(seed)
    return {
        name: torch.randint(count, (batch,) if name in world.scene_factors else (batch, objects), generator=generator)
        for name, count in world.cards.items()
    }


def direct_coverage(world: World, shape: str, texture: str, radius: float, turn: int, x: float, y: float) -> Any:
    """Rasterise one object by testing every sub-sample of the whole frame."""
    size = world.config.size
    steps = (np.arange(size * SUBSAMPLES) + 0.5) / SUBSAMPLES
    dx, dy = (steps[None, :] - x) / radius, (steps[:, None] - y) / radius
    angle = 2 * math.pi * turn / world.config.rotations
    u = torch.from_numpy(math.cos(angle) * dx + math.sin(angle) * dy)
    v = torch.from_numpy(math.cos(angle) * dy - math.sin(angle) * dx)
    inside = (signed_distance(shape, u, v) <= 1e-5).double()
    paint = (
        inside if texture == "solid" else inside * (1 - DARKENING * (texture_distance(texture, u, v) <= 1e-5).double())
    )
    blocks = (size, SUBSAMPLES, size, SUBSAMPLES)
    return inside.view(blocks).mean(dim=(1, 3)).float(), paint.view(blocks).mean(dim=(1, 3)).float()


def test_default_grid_has_the_documented_size() -> None:
    world = World()
    assert math.prod(world.cards.values()) == 4 * 3 * 8**5
    assert world.factors == ("shape", "size", "rotation", "x", "y", "hue", "texture", "background")
    assert world.values("size").tolist() == pytest.approx([0.125, 0.17, 0.22])
    assert world.names("hue") == ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")


@pytest.mark.parametrize("settings", [{}, {"shapes": 8, "textures": 3, "background": "floor_wall", "backgrounds": 3}])
def test_index_and_unravel_undo_each_other(settings: dict[str, Any]) -> None:
    world = World(**settings)
    total = math.prod(world.cards.values())
    index = torch.randint(total, (5000,), generator=stream_generator(1))
    index[:2] = torch.tensor([0, total - 1])
    factors = world.unravel(index)
    assert torch.equal(world.index(factors), index)
    assert all(int(factors[name].max()) < count for name, count in world.cards.items())


def test_grid_is_row_major_with_the_last_factor_fastest() -> None:
    world = World()
    first, second = world.unravel(0), world.unravel(1)
    assert {name for name in world.factors if first[name] != second[name]} == {"background"}
    assert int(world.unravel(math.prod(world.cards.values()) // 4)["shape"]) == 1


def test_worlds_hash_and_compare_by_their_settings() -> None:
    assert World() == World()
    assert hash(World()) == hash(World())
    assert World() != World(size=16)
    assert len({World(), World(noise=0.1), World(aa="sdf"), World()}) == 3
    assert World().replace(noise=0.1) == World(noise=0.1)
    assert eval(repr(World(size=16, shapes=("star",)))) == World(size=16, shapes=("star",))


@pytest.mark.parametrize("size", [16, 32, 33])
def test_placing_from_the_atlas_equals_direct_rasterisation_exactly(size: int) -> None:
    world = World(size, shapes=8, textures=3, hues=("white",), backgrounds=("black",), channels=1, phases=4)
    factors = random_factors(world, 60, 1)
    factors["shape"] = (torch.arange(60) % 8)[:, None]
    drawn = world.render(factors, True)
    units = world.config.position_units
    for row in range(60):
        value = {name: int(tensor[row].reshape(-1)[0]) for name, tensor in factors.items()}
        cover, paint = direct_coverage(
            world,
            SHAPES[value["shape"]],
            world.names("texture")[value["texture"]],
            world.config.sizes[value["size"]] * size,
            value["rotation"],
            units[value["x"]] / 4,
            units[value["y"]] / 4,
        )
        assert torch.equal(drawn.amodal[row, 0], cover)
        assert torch.equal(drawn.masks[row, 1], cover)
        torch.testing.assert_close(drawn.image[row, 0], paint, rtol=0, atol=1e-6)


def test_objects_at_the_very_border_are_cut_off_there() -> None:
    world = World(32, positions=2, margin=0.0, hues=("white",), backgrounds=("black",), channels=1)
    corners = world.render({"shape": 0, "x": torch.tensor([0, 1, 0, 1]), "y": torch.tensor([0, 0, 1, 1])})
    whole = world.replace(positions=1).render({"shape": 0})
    assert float(corners.sum()) == pytest.approx(float(whole.sum()), rel=1e-5)
    assert torch.equal(corners[0], corners[3].flip(-1, -2))


@pytest.mark.parametrize("aa", ["atlas", "sdf"])
def test_masks_sum_to_one_and_agree_with_labels(aa: str) -> None:
    world = World(24, shapes=8, textures=2, aa=aa)
    drawn = world.render(random_factors(world, 40, 4), True)
    torch.testing.assert_close(drawn.masks.sum(dim=1), torch.ones(40, 24, 24), rtol=0, atol=1e-6)
    assert float(drawn.masks.min()) >= 0
    assert torch.equal(drawn.labels, drawn.masks.argmax(dim=1))
    assert drawn.labels.dtype == torch.int64


def test_the_last_object_lies_in_front_and_amodal_masks_ignore_it() -> None:
    world = World()
    pair = {"shape": torch.tensor([[1, 1]]), "hue": torch.tensor([[0, 5]]), "size": torch.tensor([[2, 0]])}
    drawn = world.render(pair, True)
    assert int(drawn.labels[0, 16, 16]) == 2
    assert drawn.image[0, :, 16, 16].mul(255).round().int().tolist() == list(object_rgb("blue"))
    alone = world.render({name: value[:, :1] for name, value in pair.items()}, True)
    assert torch.equal(drawn.amodal[:, 0], alone.amodal[:, 0])
    assert torch.equal(drawn.masks[:, 1], alone.masks[:, 1] * (1 - drawn.amodal[:, 1]))


def test_image_is_the_masks_times_the_colours() -> None:
    world = World(background="floor_wall")
    factors = random_factors(world, 20, 3)
    drawn = world.render(factors, True)
    colours = torch.tensor([object_rgb(name) for name in world.names("hue")])[factors["hue"]] / 255.0
    expected = torch.einsum("bkhw,bkc->bchw", drawn.masks[:, 1:], colours)
    empty = world.render({**factors, "present": torch.zeros(20, 3, dtype=torch.bool)})
    torch.testing.assert_close(drawn.image, expected + drawn.masks[:, :1] * empty, rtol=0, atol=1e-6)


def test_grounds_have_their_named_colours() -> None:
    world = World(background="floor_wall", backgrounds=("red", "grey"))
    image = world.render({"wall": torch.tensor([0, 1]), "floor": torch.tensor([1, 0]), "x": 0, "y": 0}, out="uint8")
    assert image[:, :, 0, -1].tolist() == [list(ground_rgb("red")), list(ground_rgb("grey"))]
    assert image[0, :, -1, -1].tolist() != image[1, :, -1, -1].tolist()
    plain = World(backgrounds=9).render({"background": torch.tensor([8])}, out="uint8")
    assert plain[0, :, 0, 0].tolist() == [115, 115, 115]


def test_absent_objects_leave_no_trace() -> None:
    world = World()
    factors = random_factors(world, 10, 3)
    present = torch.tensor([[True, False, True]]).expand(10, 3)
    drawn = world.render({**factors, "present": present}, True)
    kept = {n: v if n in world.scene_factors else v[:, [0, 2]] for n, v in factors.items()}
    assert torch.equal(drawn.image, world.render(kept))
    assert float(drawn.masks[:, 2].abs().sum()) == 0
    assert not (drawn.labels == 2).any()


def test_pictures_do_not_depend_on_their_company() -> None:
    world = World()
    factors = random_factors(world, 30, 2)
    together = world.render(factors)
    for row in (0, 7, 29):
        assert torch.equal(
            world.render({name: value[row : row + 1] for name, value in factors.items()})[0], together[row]
        )


def test_uint8_is_the_rounded_float_and_minus_one_to_one_its_stretch() -> None:
    world = World()
    factors = random_factors(world, 30, 3)
    image = world.render(factors)
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    assert image.dtype == torch.float32
    rounded = world.render(factors, out="uint8")
    assert float((rounded.float() - image * 255).abs().max()) <= 0.5001
    torch.testing.assert_close(world.render(factors, range="-11"), image * 2 - 1, rtol=0, atol=1e-6)


def test_circles_look_the_same_at_any_rotation_and_canonical_factors_say_so() -> None:
    world = World(shapes=8, textures=3)
    factors = random_factors(world, 400, 1)
    canonical = world.canonical(factors)
    assert torch.equal(world.render(factors, out="uint8"), world.render(canonical, out="uint8"))
    plain_circle = (factors["shape"] == 0) & (factors["texture"] == 0)
    assert int(canonical["rotation"][plain_circle].max()) == 0
    assert bool((canonical["rotation"] != factors["rotation"]).any())


def test_noise_has_its_own_key_and_never_moves_anything() -> None:
    quiet = World(backgrounds=("grey",))
    loud = quiet.replace(noise=0.1)
    factors = random_factors(quiet, 50, 1)
    keys = torch.arange(50)
    noise = loud.render(factors, noise_keys=keys) - quiet.render(factors)
    ground = quiet.render(factors, True).masks[:, :1].expand(-1, 3, -1, -1) == 1
    assert float(noise[ground].std()) == pytest.approx(0.1, rel=0.02)
    assert float(noise[ground].mean()) == pytest.approx(0.0, abs=0.002)
    alone = loud.render({name: value[3:4] for name, value in factors.items()}, noise_keys=keys[3:4])
    assert torch.equal(alone[0], loud.render(factors, noise_keys=keys)[3])
    for generator_seed in range(3):
        draws = [MultiObject(w).batch(4, stream_generator(generator_seed)) for w in (quiet, loud)]
        assert torch.equal(draws[0]["factors"], draws[1]["factors"])
        assert not torch.equal(draws[0]["image"], draws[1]["image"])


def test_exact_mode_agrees_with_the_atlas() -> None:
    world = World(shapes=8, textures=3)
    factors = random_factors(world, 100, 2)
    copied, exact = world.render(factors, True), world.replace(aa="sdf").render(factors, True)
    assert float((copied.amodal - exact.amodal).abs().mean()) < 0.004
    assert float((copied.amodal - exact.amodal).abs().max()) < 0.5
    assert float((copied.image - exact.image).abs().mean()) < 0.006


def test_physical_values_draw_the_exact_picture_of_the_factors() -> None:
    world = World(shapes=8, textures=3, background="floor_wall")
    factors = random_factors(world, 20, 3)
    exact = world.replace(aa="sdf").render(factors, True)
    again = world.render_physical(world.physical(factors), True)
    torch.testing.assert_close(again.image, exact.image, rtol=0, atol=1e-4)
    assert torch.equal(again.labels, exact.labels)


def test_exact_mode_is_differentiable_in_the_pose() -> None:
    world = World(16, shapes=8, textures=3, aa="sdf")
    factors = random_factors(world, 16, 1, seed=2)
    factors["shape"] = (torch.arange(16) % 8)[:, None]
    pose = {
        name: value.double() if value.is_floating_point() else value for name, value in world.physical(factors).items()
    }
    target = torch.rand(16, 3, 16, 16, generator=stream_generator(3), dtype=torch.float64)
    for name in ("x", "y", "radius", "rotation", "rgb"):
        free = (pose[name] + 0.00123).clone().requires_grad_()
        direction = torch.randn(free.shape, generator=stream_generator(4), dtype=torch.float64)

        def objective(value: Tensor, name: str = name) -> Tensor:
            return (world.render_physical({**pose, name: value}) * target).sum()

        (gradient,) = torch.autograd.grad(objective(free), free)
        step = 1e-6
        difference = (objective(free + step * direction) - objective(free - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(difference.detach()), rel=1e-3)


def test_exact_mode_moves_by_fractions_of_a_pixel() -> None:
    world = World(aa="sdf", hues=("white",), backgrounds=("black",), channels=1)
    pose = world.physical({"shape": torch.zeros(20, dtype=torch.int64)})
    shift = torch.arange(20)[:, None] * 0.1 / 32
    images = world.render_physical({**pose, "x": pose["x"] + shift})
    columns = torch.arange(32) + 0.5
    centres = (images.sum(dim=(1, 2)) * columns).sum(dim=1) / images.sum(dim=(1, 2, 3))
    torch.testing.assert_close(centres - centres[0], shift[:, 0] * 32, rtol=0, atol=0.02)


def test_grey_worlds_have_one_channel() -> None:
    image = World(channels=1, hues=("white",), backgrounds=("black",)).render({"shape": torch.tensor([1])}, out="uint8")
    assert image.shape == (1, 1, 32, 32)
    assert int(image[0, 0, 16, 16]) == 255
    assert int(image[0, 0, 0, 0]) == 0


def test_sixty_four_pictures_are_the_same_bytes_everywhere() -> None:
    world = World(shapes=8, textures=3, backgrounds=9)
    grid = torch.arange(64)
    factors = {
        "shape": torch.stack([grid % 8, (grid + 3) % 8, (grid + 5) % 8], dim=1),
        "size": torch.stack([grid % 3, (grid + 1) % 3, (grid + 2) % 3], dim=1),
        "rotation": torch.stack([grid // 8, (grid * 3) % 8, (grid * 5) % 8], dim=1),
        "x": torch.stack([grid % 8, (grid * 5) % 8, (grid * 3 + 2) % 8], dim=1),
        "y": torch.stack([(grid // 3) % 8, (grid * 7 + 1) % 8, (grid + 4) % 8], dim=1),
        "hue": torch.stack([grid % 8, (grid + 2) % 8, (grid + 5) % 8], dim=1),
        "texture": torch.stack([grid % 3, (grid // 2) % 3, (grid // 5) % 3], dim=1),
        "background": grid % 9,
    }
    image = world.render(factors, out="uint8")
    assert (
        hashlib.sha256(image.numpy().tobytes()).hexdigest()
        == "4cdac6324e1f05f9fbe457aa845a6e216a1d885083b4a4e27dc67ba1ef55b544"
    )
    drawn = MultiObject(World(), out="uint8").batch(64, stream_generator(0))
    assert (
        hashlib.sha256(drawn["image"].numpy().tobytes()).hexdigest()
        == "a5a59183d679f5c9cf5378fa6c2e4fc8e791fda991ce27dbfad94bdde2a07f9c"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shapes": ("circle", "heart")}, "unknown: 'heart'"),
        ({"shapes": 9}, "shapes must lie between 1 and 8"),
        ({"hues": ("red", "mauve")}, "unknown: 'mauve'"),
        ({"hues": ("red", "red")}, "different names"),
        ({"textures": ("tartan",)}, "unknown: 'tartan'"),
        ({"sizes": (0.45,)}, "patches that fit"),
        ({"sizes": (0.2, 0.1)}, "ascending"),
        ({"sizes": 7}, "sizes must lie between 1 and 6"),
        ({"phases": 3}, "phases must be even"),
        ({"phases": 0}, "phases must be even"),
        ({"noise": -0.1}, "noise must not be negative"),
        ({"positions": 100}, "positions must be at most"),
        ({"channels": 4}, "channels must be 1 or 3"),
        ({"background": "sky"}, "background must be"),
        ({"aa": "msaa"}, "aa must be"),
        ({"margin": 0.5}, "margin must lie"),
        ({"rotations": 0}, "rotations must be positive"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(**settings)


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ({"shape": torch.tensor([4])}, ValueError, r"'shape' must lie in \[0, 4\), got 4"),
        ({"hue": torch.tensor([-1])}, ValueError, r"'hue' must lie in \[0, 8\)"),
        ({"shape": torch.tensor([0.0])}, TypeError, "'shape' must be int64"),
        ({"colour": torch.tensor([0])}, ValueError, "unknown: colour"),
        ({"shape": torch.zeros(2, dtype=torch.int64), "hue": torch.zeros(3, dtype=torch.int64)}, ValueError, "agree"),
        ({"background": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "scene factors"),
    ],
)
def test_bad_factors_are_refused(factors: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        World().render(factors)


def test_other_bad_input_is_refused() -> None:
    world = World()
    with pytest.raises(ValueError, match="index must lie in"):
        world.unravel(math.prod(world.cards.values()))
    with pytest.raises(ValueError, match="missing: size"):
        world.index({name: torch.tensor([0]) for name in world.factors if name != "size"})
    with pytest.raises(ValueError, match="factor must be one of"):
        world.values("weight")
    with pytest.raises(ValueError, match="factor must be one of"):
        world.names("rotation")
    with pytest.raises(ValueError, match="out must be"):
        world.render({}, out="float16")
    with pytest.raises(ValueError, match="out must be"):
        world.render({}, out="uint8", range="-11")
    with pytest.raises(ValueError, match="range must be"):
        world.render({}, range="02")
    with pytest.raises(ValueError, match="noise_keys"):
        World(noise=0.1).render({})
    with pytest.raises(ValueError, match="no atlas"):
        _ = World(aa="sdf").atlas
