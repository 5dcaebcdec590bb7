"""How many pictures a second the scenes world draws, beside a straightforward rasteriser that draws one picture at a time.

    python benchmarks/scenes.py [--repeats 15] [--batch 256] [--threads 1]

The peer draws the same pictures (same shapes, sizes, rotations, places and colours, the same anti-aliasing over 4 x 4
sub-samples) with Pillow: polygons on a canvas of four times the side, then a box filter. Both run in this process, in turn,
on the same factors; each figure is the median over the repeats.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from headgate.data.scenes import CaptionedScenes, MultiObject, World
from headgate.data.scenes.palette import ground_rgb, object_rgb
from headgate.data.seeding import stream_generator

TARGET = 5000  # pictures a second, one object at 32 pixels, one thread
PEER_PICTURES = 64
FINENESS = 4


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a default shape of radius 1; a circle is drawn as an ellipse."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        turns = [2 * math.pi * corner / 3 - math.pi / 2 for corner in range(3)]
        return [(1.25 * math.cos(turn), 1.25 * math.sin(turn)) for turn in turns]
    a, b = 1.15, 0.4
    quarter = [(b, -a), (b, -b), (a, -b)]
    return [(c * x - s * y, s * x + c * y) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter]


def draw_one_by_one(world: World, scenes: dict[str, Tensor]) -> list[np.ndarray]:
    """The peer: one picture, one object, one polygon at a time."""
    config = world.config
    side = config.size * FINENESS
    places = [unit * FINENESS / config.phases for unit in config.position_units]
    rows = {name: scenes[name].tolist() for name in (*world.factors, "present")}
    images = []
    for row in range(len(rows["shape"])):
        image = Image.new("RGB", (side, side), ground_rgb(config.backgrounds[rows["background"][row]]))
        pen = ImageDraw.Draw(image)
        for slot, present in enumerate(rows["present"][row]):
            if not present:
                continue
            value = {name: rows[name][row][slot] for name in world.object_factors}
            radius = config.sizes[value["size"]] * side
            x, y = places[value["x"]], places[value["y"]]
            colour = object_rgb(config.hues[value["hue"]])
            shape = config.shapes[value["shape"]]
            if shape == "circle":
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            else:
                angle = 2 * math.pi * value["rotation"] / config.rotations
                c, s = radius * math.cos(angle), radius * math.sin(angle)
                pen.polygon([(x + c * u - s * v, y + s * u + c * v) for u, v in outline(shape)], fill=colour)
        images.append(np.asarray(image.reduce(FINENESS)))
    return images


def rate(draw: Callable[[], object], pictures: int, repeats: int) -> float:
    """Pictures a second, median over the repeats, after one run to warm up."""
    draw()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    return pictures / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    table = Table(title=f"scenes, pictures/s, {arguments.threads} thread(s), batch {arguments.batch}, float32")
    for heading in (
        "side",
        "objects",
        "render",
        "peer (Pillow)",
        "ratio",
        "batch with masks",
        "with captions",
        "exact mode",
    ):
        table.add_column(heading, justify="right")
    verdict = ""
    for size in (32, 16):
        world = World(size)
        exact = world.replace(aa="sdf")
        for objects in (1, 3, 5):
            multi = MultiObject(world, objects)
            caption = CaptionedScenes(world, objects, caption_level=3)
            drawn = multi.draw(arguments.batch, stream_generator(0))
            scenes = {name: drawn[name] for name in (*world.factors, "present")}
            few = {name: value[:PEER_PICTURES] for name, value in scenes.items()}
            difference = np.stack(draw_one_by_one(world, few)) - world.render(few).permute(0, 2, 3, 1).numpy() * 255
            if np.abs(difference).mean() > 4:
                raise SystemExit(
                    f"the peer draws other pictures: mean difference {np.abs(difference).mean():.1f} of 255"
                )
            generator = stream_generator(1)
            ours = rate(lambda w=world, s=scenes: w.render(s), arguments.batch, arguments.repeats)
            peer = rate(lambda w=world, s=few: draw_one_by_one(w, s), len(few["shape"]), arguments.repeats)
            batches = rate(lambda m=multi, g=generator: m.batch(arguments.batch, g), arguments.batch, arguments.repeats)
            texts = rate(lambda c=caption, g=generator: c.batch(arguments.batch, g), arguments.batch, arguments.repeats)
            smooth = rate(lambda e=exact, s=few: e.render(s), len(few["shape"]), arguments.repeats)
            figures = [f"{value:,.0f}" for value in (ours, peer)] + [f"{ours / peer:.1f}x"]
            figures += [f"{value:,.0f}" for value in (batches, texts, smooth)]
            table.add_row(str(size), str(objects), *figures)
            if (size, objects) == (32, 1):
                reached = "reached" if ours >= TARGET else "missed"
                verdict = f"target: {TARGET:,} pictures/s with one object at 32 pixels: {reached} ({ours:,.0f})"
    console = Console()
    console.print(table)
    console.print(verdict)


if __name__ == "__main__":
    main()
