"""One interface for images with known factors, and readers of the public files."""

from headgate.data.factors.archives import MPI3D, DSprites, Shapes3D
from headgate.data.factors.clevr import ClevrFolder
from headgate.data.factors.language import CocoCaptions, PopeQuestions
from headgate.data.factors.protocol import FactorDataset, FactorGrid, FactorSubset

__all__ = [
    "MPI3D",
    "ClevrFolder",
    "CocoCaptions",
    "DSprites",
    "FactorDataset",
    "FactorGrid",
    "FactorSubset",
    "PopeQuestions",
    "Shapes3D",
]
