"""A procedural visual world: coloured shapes with known factors, in four views, without files."""

from headgate.data.scenes.captions import CaptionedScenes
from headgate.data.scenes.multi import MultiObject
from headgate.data.scenes.noise import NoiseModel
from headgate.data.scenes.single import SingleObject
from headgate.data.scenes.splits import split
from headgate.data.scenes.video import MovingScenes
from headgate.data.scenes.world import World

__all__ = ["CaptionedScenes", "MovingScenes", "MultiObject", "NoiseModel", "SingleObject", "World", "split"]
