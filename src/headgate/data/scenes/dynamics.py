"""How objects move: straight on, bouncing off one another, in circles, or along one factor.

Positions are in units of 1/phases pixel. Straight motion between walls is the triangle wave: with span s = high - low and
u = (p - low) mod 2 s, the position is low + s - |u - s|, and the velocity turns round while u > s.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["bounce", "fold", "linear", "orbit", "speed_limit", "step_factor"]

_SUBSTEPS = 8


def fold(position: Tensor, low: Tensor | int, high: Tensor | int) -> tuple[Tensor, Tensor]:
    """Reflect positions between two walls.

    Args:
        position: where objects would be without walls; integer or floating point.
        low: of the walls.
        high: of the walls; where it equals ``low`` nothing moves.

    Returns:
        The reflected positions, and 1 or -1 for the direction in which a positive velocity now points.
    """
    span = torch.as_tensor(high) - torch.as_tensor(low)
    around = torch.remainder(position - low, (2 * span).clamp_min(1))
    return torch.where(span > 0, low + span - (around - span).abs(), torch.as_tensor(low)), torch.where(
        around < span, 1, -1
    )


def linear(start: Tensor, velocity: Tensor, low: Tensor, high: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Move with constant speed, reflected by the walls.

    Args:
        start: (batch, objects, 2), integer or floating point.
        velocity: (batch, objects, 2) per frame.
        low: (batch, objects, 1) of the walls for the centres.
        high: (batch, objects, 1).
        frames: how many.

    Returns:
        Positions and velocities (batch, frames, objects, 2).
    """
    time = torch.arange(frames).view(1, -1, 1, 1)
    position, direction = fold(start[:, None] + time * velocity[:, None], low[:, None], high[:, None])
    return position, velocity[:, None] * direction


def bounce(
    start: Float[Tensor, "batch objects 2"],
    velocity: Float[Tensor, "batch objects 2"],
    radius: Float[Tensor, "batch objects"],
    present: Bool[Tensor, "batch objects"],
    low: Float[Tensor, "batch objects 1"],
    high: Float[Tensor, "batch objects 1"],
    frames: int,
) -> tuple[Float[Tensor, "batch frames objects 2"], Float[Tensor, "batch frames objects 2"]]:
    """Let discs collide elastically; their masses are their areas.

    Two discs that overlap and approach exchange momentum along the line n of their centres:
    v_i ← v_i - 2 m_j / (m_i + m_j) ((v_i - v_j)·n) n, and v_j likewise. Time runs in eighths of a frame.

    Args:
        start: centres.
        velocity: per frame.
        radius: of the discs.
        present: absent discs touch nothing.
        low: of the walls for the centres.
        high: of the walls.
        frames: how many.

    Returns:
        Positions and velocities at each frame.
    """
    position, velocity = start.clone(), velocity.clone()
    mass = radius**2
    objects = start.shape[1]
    positions, velocities = [position.clone()], [velocity.clone()]
    for _ in range(frames - 1):
        for _ in range(_SUBSTEPS):
            position, direction = fold(position + velocity / _SUBSTEPS, low, high)
            velocity = velocity * direction
            for first in range(objects):
                for second in range(first + 1, objects):
                    between = position[:, first] - position[:, second]
                    distance = between.norm(dim=-1, keepdim=True)
                    normal = between / distance.clamp_min(1e-9)
                    closing = ((velocity[:, first] - velocity[:, second]) * normal).sum(dim=-1, keepdim=True)
                    touch = (distance < (radius[:, first] + radius[:, second])[:, None]) & (closing < 0)
                    touch &= (present[:, first] & present[:, second])[:, None]
                    push = touch * 2 * closing * normal / (mass[:, first] + mass[:, second])[:, None]
                    velocity[:, first] -= push * mass[:, second, None]
                    velocity[:, second] += push * mass[:, first, None]
        positions.append(position.clone())
        velocities.append(velocity.clone())
    return torch.stack(positions, dim=1), torch.stack(velocities, dim=1)


def orbit(
    start: Float[Tensor, "batch objects 2"],
    turn: Float[Tensor, "batch objects"],
    middle: float,
    least: float,
    frames: int,
) -> tuple[Float[Tensor, "batch frames objects 2"], Float[Tensor, "batch frames objects 2"]]:
    """Move on circles about the middle of the image.

    Args:
        start: where the objects are at first; a start nearer than ``least`` is moved out to that distance.
        turn: radians per frame.
        middle: both coordinates of the middle.
        least: the smallest radius of a circle.
        frames: how many.

    Returns:
        Positions and velocities, the velocity being the derivative of the position.
    """
    arm = start - middle
    distance = arm.norm(dim=-1, keepdim=True)
    rightwards = torch.tensor([1.0, 0.0], dtype=start.dtype)
    arm = torch.where(distance < 1e-9, rightwards, arm / distance.clamp_min(1e-9)) * distance.clamp_min(least)
    angle = turn[:, None] * torch.arange(frames)[None, :, None]
    cosine, sine = angle.cos(), angle.sin()
    x, y = arm[:, None, :, 0], arm[:, None, :, 1]
    turned = torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1)
    tangent = torch.stack([-turned[..., 1], turned[..., 0]], dim=-1)
    return middle + turned, tangent * turn[:, None, :, None]


def step_factor(
    start: Int[Tensor, " batch"], direction: Int[Tensor, " batch"], count: int, cyclic: bool, frames: int
) -> Int[Tensor, "batch frames"]:
    """Move a factor by one step per frame: around for a cyclic one, to and fro otherwise.

    Args:
        start: first values.
        direction: 1 or -1.
        count: values of the factor.
        cyclic: whether the first value follows the last.
        frames: how many.
    """
    values = start[:, None] + direction[:, None] * torch.arange(frames)
    return values % count if cyclic else fold(values, 0, count - 1)[0]


def speed_limit(speed: float, phases: int) -> int:
    """Give a speed in pixels per frame as whole units, at least one.

    Raises:
        ValueError: slower than one unit.
    """
    units = math.floor(speed * phases + 1e-9)
    if units < 1:
        raise ValueError(f"speed must be at least 1/{phases} pixel per frame, got {speed}")
    return units
