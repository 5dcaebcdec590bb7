"""How weights start in the published code: normal with one small standard deviation, biases at zero, norms at one.

The first release draws a few of its matrices from Xavier's uniform distribution (Glorot and Bengio 2010) in its place.
"""

from __future__ import annotations

from torch import nn

from headgate.nn import ShortConvolution

__all__ = ["initialize", "start_from_xavier"]

_GAIN = "xavier_gain"


def initialize(module: nn.Module, std: float = 0.02) -> None:
    """Draw the parameters that ``module`` itself owns, not those of its submodules.

    Args:
        module: linear layers, embeddings, short convolutions and norms are drawn; anything else stays as it is.
        std: standard deviation.
    """
    if isinstance(module, nn.Linear | nn.Embedding | ShortConvolution):
        gain = vars(module).get(_GAIN)
        if gain is None:
            nn.init.normal_(module.weight, std=std)
        else:
            nn.init.xavier_uniform_(module.weight, gain=gain)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm) and module.weight is not None:
        nn.init.ones_(module.weight)


def start_from_xavier(layer: nn.Linear, gain: float) -> None:
    """From now on, :func:`initialize` draws this layer's matrix from Xavier's uniform distribution.

    The note stands on the layer itself, since transformers initialises modules one by one and passes by those that own
    no parameters.

    Args:
        layer: whose matrix it is.
        gain: factor on the bound ``sqrt(6 / (in + out))``.
    """
    vars(layer)[_GAIN] = gain
