r"""Diffusion transformer with adaLN-zero, small or large, conditional or not (also the network of SiT and REPA).

Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748). With the condition c = MLP(sinusoids(t)) +
label, each block computes, from six vectors that a linear layer (zero at the start) makes of SiLU(c),

.. math:: x \leftarrow x + g_1\,\mathrm{attention}(\mathrm{LN}(x)(1 + s_1) + b_1), \qquad
          x \leftarrow x + g_2\,\mathrm{mlp}(\mathrm{LN}(x)(1 + s_2) + b_2)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from headgate.nn.attention import MultiHeadAttention
from headgate.nn.diffusion.embeddings import grid_sinusoids, time_sinusoids
from headgate.nn.feed_forward import FeedForward
from headgate.validate import check_divides, check_floating, check_integer, check_positive, check_shape

__all__ = ["DiT", "DiTBlock", "convert_dit_state_dict"]

_FREQUENCIES = 256


class DiTBlock(nn.Module):
    """One block: attention and a token-wise network, modulated by the condition.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        mlp_ratio: inner width over ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = MultiHeadAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), partial(F.gelu, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Run the block on tokens ``x`` under ``condition``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Denoiser of images or latents.

    Args:
        input_size: side of the square maps.
        patch_size: side of a patch; must divide ``input_size``.
        in_channels: of the maps.
        dim: channels.
        depth: blocks.
        num_heads: heads; must divide ``dim``.
        mlp_ratio: inner width of the token-wise networks over ``dim``.
        num_classes: classes; label ``num_classes`` is the null class. 0 for a network without labels.
        out_channels: default ``in_channels``; twice as many where the variance is learned.

    Raises:
        ValueError: sizes that do not fit.
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        dim: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        *,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, patch_size=patch_size, in_channels=in_channels, dim=dim, depth=depth)
        check_divides(patch_size=patch_size, input_size=input_size)
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no labels) or more, got {num_classes}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.dim = dim
        self.num_classes = num_classes
        self.grid = input_size // patch_size
        self.out_channels = in_channels if out_channels is None else out_channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))}
        )
        self.y_embedder = nn.ModuleDict()
        if num_classes:
            self.y_embedder["embedding_table"] = nn.Embedding(num_classes + 1, dim)
        self.register_buffer("pos_embed", grid_sinusoids(self.grid, self.grid, dim))
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False),
                "linear": nn.Linear(dim, patch_size**2 * self.out_channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)),
            }
        )
        self._init_weights()

    @property
    def null_label(self) -> int:
        """The label that stands for no label."""
        if not self.num_classes:
            raise ValueError("the network has no labels, hence no null label")
        return self.num_classes

    def forward(
        self,
        x: Float[Tensor, "batch channels side side"],
        timesteps: Real[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out side side"]:
        """Predict noise or velocity.

        Args:
            x: noisy maps ``(batch, in_channels, input_size, input_size)``.
            timesteps: ``(batch,)`` times as the network was trained with.
            labels: ``(batch,)`` in [0, num_classes], the last one null; if and only if the network has labels.

        Returns:
            ``(batch, out_channels, input_size, input_size)``.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape, or labels missing or not wanted.
        """
        condition = self.condition(timesteps, labels, batch=x.shape[0])
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.decode(x, condition)

    def condition(
        self, timesteps: Real[Tensor, " batch"], labels: Int[Tensor, " batch"] | None, batch: int | None = None
    ) -> Float[Tensor, "batch dim"]:
        """What the blocks hear: the embedded time, plus the embedded label."""
        check_shape("timesteps", timesteps, (batch,), "batch")
        if (labels is None) != (self.num_classes == 0):
            has = "no labels" if self.num_classes == 0 else f"{self.num_classes} classes and a null label"
            given = "no labels" if labels is None else "labels"
            raise ValueError(f"labels must be given if and only if the network has them; it has {has}, got {given}")
        mlp = self.t_embedder["mlp"]
        waves = time_sinusoids(timesteps, _FREQUENCIES).to(next(mlp.parameters()).dtype)
        condition: Tensor = mlp(waves)
        if labels is not None:
            check_shape("labels", labels, (timesteps.shape[0],), "batch")
            check_integer("labels", labels)
            condition = condition + self.y_embedder["embedding_table"](labels)
        return condition

    def embed(self, x: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch tokens dim"]:
        """Patches with their positions, in raster order."""
        check_shape(
            "x", x, (None, self.in_channels, self.input_size, self.input_size), "batch, channels, height, width"
        )
        check_floating("x", x, like=self.pos_embed.dtype)
        return self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed

    def decode(
        self, tokens: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch out side side"]:
        """Maps from the last block's tokens."""
        shift, scale = self.final_layer["adaLN_modulation"](condition)[:, None].chunk(2, dim=-1)
        patches = self.final_layer["linear"](self.final_layer["norm_final"](tokens) * (1 + scale) + shift)
        p, side = self.patch_size, self.grid
        maps = patches.reshape(-1, side, side, p, p, self.out_channels)
        return maps.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * p, side * p)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj = self.x_embedder["proj"]
        assert isinstance(proj, nn.Conv2d)
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)
        for layer in self.t_embedder["mlp"].modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for table in self.y_embedder.parameters():
            nn.init.normal_(table, std=0.02)
        silent = [self.final_layer["linear"], *(m for n, m in self.named_modules() if n.endswith("adaLN_modulation.1"))]
        for layer in silent:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def convert_dit_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of facebookresearch/DiT and willisma/SiT → ours: the attention's output projection alone is called otherwise."""
    return {re.sub(r"\.attn\.proj\.", ".attn.out_proj.", name): value for name, value in state.items()}
