"""Moving scenes: motion laws, identities, traversals and the occluder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.data.scenes import MovingScenes, World
from headgate.data.scenes import dynamics as motion
from headgate.data.scenes.palette import object_rgb
from headgate.data.scenes.video import MOVABLE
from headgate.data.seeding import stream_generator


def video(
    dynamics: str, world: World | None = None, count: int = 40, **settings: Any
) -> tuple[MovingScenes, dict[str, Tensor]]:
    dataset = MovingScenes(world or World(), dynamics=dynamics, **settings)
    return dataset, dataset.batch(count, stream_generator(0))


@pytest.mark.parametrize("dynamics", ["linear", "bounce", "orbit", "factor"])
@pytest.mark.parametrize("aa", ["atlas", "sdf"])
def test_frames_masks_and_identities(dynamics: str, aa: str) -> None:
    world = World(aa=aa)
    _, batch = video(dynamics, world, 10, T=5, n_objects=(1, 3), slots=4)
    assert batch["frames"].shape == (10, 5, 3, 32, 32)
    assert batch["masks"].shape == (10, 5, 5, 32, 32)
    assert batch["labels"].shape == (10, 5, 32, 32)
    assert batch["amodal"].shape == (10, 5, 4, 32, 32)
    assert batch["factors"].shape == (10, 5, 4, 7)
    assert batch["centers"].shape == batch["velocities"].shape == (10, 5, 4, 2)
    torch.testing.assert_close(batch["masks"].sum(dim=2), torch.ones(10, 5, 32, 32), rtol=0, atol=1e-5)
    # channel k shows the object of slot k in every frame, in its colour
    palette = torch.tensor([object_rgb(name) for name in world.names("hue")]) / 255.0
    pixels = batch["frames"].permute(0, 1, 3, 4, 2)
    for slot in range(4):
        whole = batch["masks"][:, :, slot + 1] == 1
        expected = palette[batch["factors"][:, :, slot, 5]][:, :, None, None].expand(-1, -1, 32, 32, -1)
        torch.testing.assert_close(pixels[whole], expected[whole])
        if dynamics != "factor":
            looks = batch["factors"][:, :, slot, [0, 1, 2, 5, 6]]
            assert torch.equal(looks, looks[:, :1].expand_as(looks))
    assert float(batch["masks"][:, :, 1:].sum(dim=(-1, -2))[~batch["present"][:, None].expand(-1, 5, -1)].sum()) == 0


@pytest.mark.parametrize("dynamics", ["linear", "bounce", "orbit"])
@pytest.mark.parametrize("aa", ["atlas", "sdf"])
def test_masks_lie_where_the_centers_say(dynamics: str, aa: str) -> None:
    world = World(aa=aa, shapes=("circle",), sizes=(0.125,), hues=("white",), backgrounds=("black",), channels=1)
    _, batch = video(dynamics, world, 20, n_objects=1)
    steps = torch.arange(32) + 0.5
    weight = batch["amodal"][:, :, 0]
    total = weight.sum(dim=(-1, -2))
    seen = (
        torch.stack(
            [(weight.sum(dim=-2) * steps).sum(-1) / total, (weight.sum(dim=-1) * steps).sum(-1) / total], dim=-1
        )
        / 32
    )
    inside = (batch["centers"][:, :, 0] > 0.13).all(-1) & (batch["centers"][:, :, 0] < 0.87).all(-1)
    assert float(inside.float().mean()) > 0.5
    torch.testing.assert_close(seen[inside], batch["centers"][:, :, 0][inside], rtol=0, atol=0.004)


@pytest.mark.parametrize("aa", ["atlas", "sdf"])
def test_linear_motion_keeps_its_speed_and_turns_at_the_border(aa: str) -> None:
    world = World(aa=aa)
    _, batch = video("linear", world, 60, T=24, n_objects=2, speed=3.0)
    centers, velocities = batch["centers"], batch["velocities"]
    speed = velocities.abs()
    torch.testing.assert_close(speed, speed[:, :1].expand_as(speed))
    assert 0 < float(speed.max()) * 32 <= 3.0 + 1e-6
    radius = world.values("size")[batch["factors"][..., 1]][..., None]
    assert bool((centers >= radius - 1e-6).all())
    assert bool((centers <= 1 - radius + 1e-6).all())
    moved = centers[:, 1:] - centers[:, :-1]
    free = (velocities[:, 1:] == velocities[:, :-1]) & ((moved - velocities[:, :-1]).abs() < 1e-6)
    turned = velocities[:, 1:] == -velocities[:, :-1]
    assert bool((free | turned).all())
    assert 0.02 < float(turned.float().mean()) < 0.5
    if aa == "atlas":
        units = centers * 64
        torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-4)


def test_fold_is_a_triangle_wave() -> None:
    position, direction = motion.fold(torch.arange(-3, 12), 2, 6)
    assert position.tolist() == [5, 6, 5, 4, 3, 2, 3, 4, 5, 6, 5, 4, 3, 2, 3]
    assert direction.tolist() == [1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1]
    still, _ = motion.fold(torch.tensor([3.0, 9.0]), 4.0, 4.0)
    assert still.tolist() == [4.0, 4.0]


def collide(
    radius: tuple[float, float], velocity: tuple[tuple[float, float], tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    low = torch.full((1, 2, 1), -1000.0, dtype=torch.float64)
    start = torch.tensor([[[0.0, 0.0], [10.0, 0.0]]], dtype=torch.float64)
    return motion.bounce(
        start,
        torch.tensor([velocity], dtype=torch.float64),
        torch.tensor([radius], dtype=torch.float64),
        torch.ones(1, 2, dtype=torch.bool),
        low,
        -low,
        12,
    )


def test_equal_discs_that_meet_head_on_exchange_velocities() -> None:
    _, velocity = collide((2.0, 2.0), ((1.0, 0.0), (-1.0, 0.0)))
    assert velocity[0, -1].flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])


def test_a_disc_that_meets_a_heavier_one_at_rest_follows_the_textbook() -> None:
    _, velocity = collide((1.0, 2.0), ((1.0, 0.0), (0.0, 0.0)))
    # masses 1 and 4: (m1 - m2) / (m1 + m2) and 2 m1 / (m1 + m2)
    assert velocity[0, -1].flatten().tolist() == pytest.approx([-0.6, 0.0, 0.4, 0.0])


def test_bouncing_conserves_momentum_away_from_walls_and_energy_everywhere() -> None:
    generator = stream_generator(5)
    start = 20 + 60 * torch.rand(50, 4, 2, generator=generator, dtype=torch.float64)
    velocity = 4 * torch.rand(50, 4, 2, generator=generator, dtype=torch.float64) - 2
    radius = 4 + 4 * torch.rand(50, 4, generator=generator, dtype=torch.float64)
    present = torch.ones(50, 4, dtype=torch.bool)
    wall = torch.full((50, 4, 1), 1e6, dtype=torch.float64)
    _, free = motion.bounce(start, velocity, radius, present, -wall, wall, 20)
    mass = (radius**2)[:, None, :, None]
    momentum, energy = (mass * free).sum(dim=2), (mass * free**2).sum(dim=(2, 3))
    torch.testing.assert_close(momentum, momentum[:, :1].expand_as(momentum))
    torch.testing.assert_close(energy, energy[:, :1].expand_as(energy))
    assert float((free[:, -1] - free[:, 0]).abs().amax(dim=(1, 2)).gt(1e-6).double().mean()) > 0.5
    place, boxed = motion.bounce(start, velocity, radius, present, radius[..., None], 100 - radius[..., None], 40)
    energy = (mass * boxed**2).sum(dim=(2, 3))
    torch.testing.assert_close(energy, energy[:, :1].expand_as(energy))
    assert bool((place >= radius[:, None, :, None] - 1e-9).all())
    assert bool((place <= 100 - radius[:, None, :, None] + 1e-9).all())


def test_absent_discs_touch_nothing() -> None:
    low = torch.full((1, 2, 1), -1000.0, dtype=torch.float64)
    start = torch.tensor([[[0.0, 0.0], [10.0, 0.0]]], dtype=torch.float64)
    velocity = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    present = torch.tensor([[True, False]])
    _, after = motion.bounce(start, velocity, torch.full((1, 2), 2.0, dtype=torch.float64), present, low, -low, 12)
    assert torch.equal(after[0, -1], velocity[0])


def test_bouncing_videos_have_collisions_that_linear_ones_lack() -> None:
    linear, bounce = (video(dynamics, World(), 60, T=16, n_objects=3)[1] for dynamics in ("linear", "bounce"))
    assert torch.equal(linear["centers"][:, 0], bounce["centers"][:, 0])
    speed = bounce["velocities"].norm(dim=-1)
    changed = ((speed - speed[:, :1]).abs() > 1e-5).flatten(1).any(dim=1)
    assert float(changed.float().mean()) > 0.3


def test_orbits_keep_their_distance_and_turn_evenly() -> None:
    world = World(aa="sdf")
    _, batch = video("orbit", world, 40, T=10, n_objects=2)
    arm = batch["centers"] - 0.5
    distance = arm.norm(dim=-1)
    torch.testing.assert_close(distance, distance[:, :1].expand_as(distance))
    assert float(distance.min()) >= 0.15 - 1e-6
    angle = torch.atan2(arm[..., 1], arm[..., 0])
    turn = torch.remainder(angle[:, 1:] - angle[:, :-1] + torch.pi, 2 * torch.pi) - torch.pi
    torch.testing.assert_close(turn, turn[:, :1].expand_as(turn), rtol=0, atol=1e-4)
    assert float(turn.abs().min()) + 1e-4 >= 0.15
    assert float(turn.abs().max()) <= 0.5 + 1e-4
    assert float((batch["velocities"] * arm).sum(dim=-1).abs().max()) < 1e-6
    torch.testing.assert_close(
        batch["velocities"].norm(dim=-1)[:, 1:], distance[:, 1:] * turn.abs(), rtol=1e-3, atol=1e-5
    )
    start = motion.orbit(torch.full((1, 1, 2), 5.0), torch.ones(1, 1), 5.0, 2.0, 2)[0]
    assert start[0, 0, 0].tolist() == [7.0, 5.0]


@pytest.mark.parametrize("T", [8, 12])
def test_factor_videos_move_one_factor_of_one_object_by_one_step_per_frame(T: int) -> None:
    world = World()
    dataset, batch = video("factor", world, 300, T=T, n_objects=(1, 3))
    names = world.object_factors
    assert dataset.movable == MOVABLE
    counts = torch.bincount(batch["moved"], minlength=5)
    assert int(counts.min()) > 30
    for row in range(300):
        factor = MOVABLE[int(batch["moved"][row])]
        slot, column = int(batch["moved_object"][row]), names.index(factor)
        assert bool(batch["present"][row, slot])
        values = batch["factors"][row]
        step = (values[1:] - values[:-1]).clone()
        moved = step[:, slot, column].clone()
        step[:, slot, column] = 0
        assert not bool(step.any())
        if factor in ("hue", "rotation"):
            moved = (moved * int(batch["direction"][row])) % world.cards[factor]
            assert moved.tolist() == [1] * (T - 1)
        else:
            assert moved.abs().tolist() == [1] * (T - 1)
        changes = (batch["frames"][row, 1:] != batch["frames"][row, :-1]).flatten(1).any(dim=1)
        assert bool(changes.all()), factor
    assert float(batch["velocities"].abs().max()) == 0


def test_factor_videos_are_the_ground_truth_traversals_of_the_renderer() -> None:
    world = World()
    _, batch = video("factor", world, 10, n_objects=2)
    for frame in range(8):
        factors = {name: batch["factors"][:, frame, :, c] for c, name in enumerate(world.object_factors)}
        assert torch.equal(world.render({**factors, "background": batch["background"]}), batch["frames"][:, frame])


def test_movable_restricts_what_moves() -> None:
    _, batch = video("factor", movable=("x", "hue"))
    assert set(batch["moved"].tolist()) == {0, 1}
    tiny = MovingScenes(World(hues=1), dynamics="factor")
    assert "hue" not in tiny.movable


def test_occluder_stands_still_in_front_of_everything() -> None:
    _, plain = video("linear", n_objects=2)
    _, batch = video("linear", n_objects=2, occluder=True)
    assert torch.equal(plain["centers"], batch["centers"])
    assert "occluder" not in plain
    bar = batch["occluder"]
    assert bar.dtype == torch.bool
    assert 0.1 < float(bar.float().mean()) < 0.3
    everywhere = bar[:, None].expand(-1, 8, -1, -1)
    assert int(batch["labels"][everywhere].max()) == 0
    assert float(batch["masks"][:, :, 1:].permute(0, 1, 3, 4, 2)[everywhere].abs().sum()) == 0
    torch.testing.assert_close(batch["masks"].sum(dim=2), torch.ones(40, 8, 32, 32), rtol=0, atol=1e-6)
    pixels = batch["frames"].permute(0, 1, 3, 4, 2)
    assert pixels[everywhere].unique().tolist() == [pytest.approx(150 / 255)]
    assert torch.equal(pixels[~everywhere], plain["frames"].permute(0, 1, 3, 4, 2)[~everywhere])
    assert torch.equal(batch["amodal"], plain["amodal"])
    hidden = (batch["amodal"] * everywhere[:, :, None]).sum()
    assert float(hidden) > 100


def test_same_generator_gives_the_same_video_and_noise_differs_between_frames() -> None:
    world = World(16, noise=0.1)
    first, second = (video("bounce", world, 3)[1] for _ in range(2))
    assert torch.equal(first["frames"], second["frames"])
    ground = first["masks"][0, :2, 0].amin(dim=0) == 1
    assert not torch.equal(first["frames"][0, 0][:, ground], first["frames"][0, 1][:, ground])
    dataset = MovingScenes(world)
    assert dataset.example(0)["frames"].shape == (8, 3, 16, 16)
    assert torch.equal(dataset.loader(2, 3, seed=1)[2]["frames"], list(dataset.loader(2, 3, seed=1))[2]["frames"])


def test_videos_keep_to_their_part() -> None:
    held = MovingScenes(World(16), n_objects=2, split="combination", part="test").batch(40, stream_generator(0))
    seen = MovingScenes(World(16), n_objects=2, split="combination", part="train").batch(40, stream_generator(0))
    looks = [{tuple(row) for row in b["factors"][:, 0][..., [0, 5]].flatten(0, 1).tolist()} for b in (held, seen)]
    assert not looks[0] & looks[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 1}, "T must be at least 2"),
        ({"dynamics": "chaos"}, "dynamics must be one of"),
        ({"movable": ("shape",)}, "movable must be factors"),
        ({"speed": 0.25}, "speed must be at least 1/2 pixel"),
        ({"dynamics": "factor", "movable": ()}, "movable must hold"),
        ({"dynamics": "factor", "movable": ("rotation",)}, "movable must hold"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovingScenes(World(), **arguments)


def test_centres_outside_the_image_are_refused() -> None:
    world = World()
    sprites = {name: torch.zeros(1, 1, dtype=torch.int64) for name in world.object_factors}
    sprites["background"] = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 64\]"):
        world.render_units({**sprites, "x": torch.tensor([[65]])})
