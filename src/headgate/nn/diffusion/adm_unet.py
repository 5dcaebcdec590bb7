r"""The ADM U-Net, whose blocks carry the numbers that papers on diffusion features use.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233); parameters have the names of
openai/guided-diffusion, so that its checkpoints load as they are. Blocks count from 1: the input blocks, each down-sampling
one included, the middle block, the output blocks. At 256 pixels these are 1–18, 19 and 20–37; the last residual block of a
level up-samples inside its block, so the output of block 22 is 16×16 already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.nn.diffusion.adm_blocks import (
    ADMAttention,
    ADMBlock,
    ADMResBlock,
    Downsample,
    Upsample,
    WideGroupNorm,
    zeroed,
)
from headgate.nn.diffusion.embeddings import time_sinusoids
from headgate.validate import check_floating, check_integer, check_positive, check_probability, check_shape

__all__ = ["ADMUNet"]


class ADMUNet(nn.Module):
    """Denoiser of images; predicts the noise and, with six output channels, what interpolates its variance.

    The defaults are those of ``256x256_diffusion_uncond.pt``, with 553 million parameters.

    Args:
        image_size: side of the images that the network is meant for; any side that the levels divide can be given.
        in_channels: of the images.
        model_channels: base width, a multiple of 32 as all widths.
        out_channels: twice ``in_channels`` where the variance is learned.
        num_res_blocks: residual blocks per level (the way up has one more).
        attention_downsampling: factors of down-sampling at which blocks have attention.
        channel_mult: width of each level over ``model_channels``; the number of levels.
        dropout: in residual blocks.
        num_classes: classes of a class-conditional network, which has no null class; ``None`` for an unconditional one.
        num_heads: attention heads, where ``num_head_channels`` is ``None``.
        num_head_channels: channels per head.
        use_scale_shift_norm: whether the time scales and shifts behind norms, rather than being added.
        resblock_updown: whether residual blocks resample; convolutions otherwise.
        use_new_attention_order: split q, k and v before heads.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        model_channels: int = 256,
        out_channels: int = 6,
        num_res_blocks: int = 2,
        attention_downsampling: Sequence[int] = (8, 16, 32),
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
        *,
        dropout: float = 0.0,
        num_classes: int | None = None,
        num_heads: int = 4,
        num_head_channels: int | None = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        check_positive(
            image_size=image_size, in_channels=in_channels, out_channels=out_channels, num_res_blocks=num_res_blocks
        )
        check_positive(model_channels=model_channels, **{f"channel_mult[{i}]": m for i, m in enumerate(channel_mult)})
        check_probability(dropout=dropout)
        if not channel_mult:
            raise ValueError("channel_mult must hold one factor per level, got none")
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.levels = len(channel_mult)
        self._check_side("image_size", image_size)
        self.image_size = image_size
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            check_positive(num_classes=num_classes)
            self.label_emb = nn.Embedding(num_classes, emb)

        def residual(channels: int, out: int, how: str | None = None) -> ADMResBlock:
            return ADMResBlock(channels, emb, dropout, out, scale_shift=use_scale_shift_norm, resample=how)

        def attention(channels: int) -> ADMAttention:
            heads = num_heads
            if num_head_channels is not None:
                if channels % num_head_channels:
                    raise ValueError(
                        f"num_head_channels must divide the width of blocks with attention, got "
                        f"num_head_channels={num_head_channels}, width {channels}"
                    )
                heads = channels // num_head_channels
            return ADMAttention(channels, heads, heads_first=not use_new_attention_order)

        channels = model_channels * channel_mult[0]
        self.input_blocks = nn.ModuleList([ADMBlock(nn.Conv2d(in_channels, channels, 3, padding=1))])
        widths, scales = [channels], [1]
        scale = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [residual(channels, model_channels * mult)]
                channels = model_channels * mult
                if scale in attention_downsampling:
                    layers.append(attention(channels))
                self.input_blocks.append(ADMBlock(*layers))
                widths.append(channels)
                scales.append(scale)
            if level < self.levels - 1:
                down = residual(channels, channels, "down") if resblock_updown else Downsample(channels)
                self.input_blocks.append(ADMBlock(down))
                scale *= 2
                widths.append(channels)
                scales.append(scale)

        self.middle_block = ADMBlock(residual(channels, channels), attention(channels), residual(channels, channels))
        skips = list(widths)
        widths.append(channels)
        scales.append(scale)

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [residual(channels + skips.pop(), model_channels * mult)]
                channels = model_channels * mult
                if scale in attention_downsampling:
                    layers.append(attention(channels))
                if level and index == num_res_blocks:
                    layers.append(residual(channels, channels, "up") if resblock_updown else Upsample(channels))
                    scale //= 2
                self.output_blocks.append(ADMBlock(*layers))
                widths.append(channels)
                scales.append(scale)
        self.block_channels = tuple(widths)
        self.block_downsampling = tuple(scales)
        self.out = nn.Sequential(
            WideGroupNorm(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))
        )

    @property
    def num_blocks(self) -> int:
        """How many numbered blocks there are; ``block_channels[b - 1]`` and ``block_downsampling[b - 1]`` tell their maps."""
        return len(self.block_channels)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch out height width"]:
        """Predict the noise in ``x``.

        Args:
            x: noisy images ``(batch, in_channels, height, width)``; sides divisible by 2^(levels - 1).
            timesteps: ``(batch,)`` integer steps, unscaled.
            labels: ``(batch,)`` classes, if and only if the network is class-conditional.

        Returns:
            ``(batch, out_channels, height, width)``.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape, a side that the levels do not divide, or labels missing or not wanted.
        """
        h, _ = self._run(x, timesteps, labels, (), self.num_blocks, {})
        return self.out(h.to(self.out[0].weight.dtype))  # type: ignore[arg-type]

    def forward_blocks(
        self,
        x: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        blocks: Sequence[int],
        labels: Int[Tensor, " batch"] | None = None,
        feedback: Mapping[int, Float[Tensor, "batch width h w"]] | None = None,
    ) -> list[Float[Tensor, "batch width h w"]]:
        """The outputs of numbered blocks; what lies behind the last of them is not computed.

        Args:
            x: as of :meth:`forward`.
            timesteps: as of :meth:`forward`.
            blocks: numbers in 1..``num_blocks``.
            labels: as of :meth:`forward`.
            feedback: number of an input block → maps of its width that are bilinearly resized and added to its output.

        Returns:
            One map per number, in the order of ``blocks``.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`, no block or an unknown one, or feedback to another than an input block.
        """
        if not blocks:
            raise ValueError("blocks must name at least one block, got none")
        for number in blocks:
            if not 1 <= number <= self.num_blocks:
                raise ValueError(f"blocks must lie in 1..{self.num_blocks}, got {number}")
        for number in feedback or {}:
            if not 1 <= number <= len(self.input_blocks):
                raise ValueError(f"feedback must go to input blocks 1..{len(self.input_blocks)}, got {number}")
        _, kept = self._run(x, timesteps, labels, tuple(blocks), max(blocks), feedback or {})
        return [kept[number] for number in blocks]

    @classmethod
    def from_guided_diffusion(
        cls, state_dict: Mapping[str, Tensor], image_size: int = 256, num_head_channels: int | None = 64, **options: Any
    ) -> Self:
        """A network with the weights of openai/guided-diffusion; its sizes are read off the weights.

        Args:
            state_dict: of the published ``UNetModel``.
            image_size: what the network was trained for.
            num_head_channels: channels per attention head, which weights do not tell.
            **options: further keywords of the class that weights do not tell (``num_heads``, ``dropout``,
                ``use_new_attention_order``).

        Raises:
            ValueError: no state dict of that network.
        """
        arguments = {**_read_sizes(state_dict), "image_size": image_size, "num_head_channels": num_head_channels}
        model = cls(**{**arguments, **options})
        try:
            model.load_state_dict(dict(state_dict))
        except RuntimeError as error:
            raise ValueError(f"state_dict does not fit the network that it describes: {error}") from error
        return model.eval()

    def _run(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        wanted: Sequence[int],
        last: int,
        feedback: Mapping[int, Tensor],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The output of block ``last``, and those of the ``wanted`` ones up to it."""
        emb = self._embed(x, timesteps, labels)
        kept: dict[int, Tensor] = {}
        skips: list[Tensor] = []
        h = x
        for number, block in enumerate(self._numbered(), 1):
            if number > len(self.input_blocks) + 1:
                h = torch.cat([h, skips.pop().to(h.dtype)], dim=1)
            h = block(h, emb)
            if number in feedback:
                added = F.interpolate(feedback[number], size=h.shape[2:], mode="bilinear", align_corners=False)
                h = h + added.to(h.dtype)
            if number <= len(self.input_blocks):
                skips.append(h)
            if number in wanted:
                kept[number] = h
            if number == last:
                break
        return h, kept

    def _numbered(self) -> Iterator[nn.Module]:
        yield from self.input_blocks
        yield self.middle_block
        yield from self.output_blocks

    def _embed(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Float[Tensor, "batch emb"]:
        check_shape("x", x, (None, self.in_channels, None, None), "batch, channels, height, width")
        check_floating("x", x, like=self.time_embed[0].weight.dtype)  # type: ignore[arg-type]
        self._check_side("x's sides", *x.shape[2:])
        check_shape("timesteps", timesteps, (x.shape[0],), "batch")
        check_integer("timesteps", timesteps)
        if (labels is None) != (self.num_classes is None):
            kind = "unconditional" if self.num_classes is None else "class-conditional"
            given = "no labels" if labels is None else "labels"
            raise ValueError(f"labels must be given if and only if the network has classes; it is {kind}, got {given}")
        emb = self.time_embed(time_sinusoids(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))  # type: ignore[arg-type]
        if labels is not None:
            check_shape("labels", labels, (x.shape[0],), "batch")
            check_integer("labels", labels)
            emb = emb + self.label_emb(labels)
        return emb

    def _check_side(self, name: str, *sides: int) -> None:
        factor = 2 ** (self.levels - 1)
        if any(side % factor for side in sides):
            raise ValueError(f"{name} must be divisible by 2^(levels - 1) = {factor}, got {', '.join(map(str, sides))}")


def _read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the class that follow from a published state dict."""
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight", "middle_block.0.in_layers.2.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"state_dict must be that of guided-diffusion's UNetModel, it lacks {', '.join(missing)}")
    base = state["time_embed.0.weight"].shape[1]
    per_level = _res_blocks(state)
    widths, attention = [], set()
    residual_resampling = True
    number, scale = 1, 1
    while f"input_blocks.{number}.0.in_layers.2.weight" in state:
        widths.append(state[f"input_blocks.{number}.0.in_layers.2.weight"].shape[0])
        if any(f"input_blocks.{n}.1.qkv.weight" in state for n in range(number, number + per_level)):
            attention.add(scale)
        # Behind the residual blocks of a level stands the one that leads down, if there is a further level.
        residual_resampling &= f"input_blocks.{number + per_level}.0.op.weight" not in state
        number, scale = number + per_level + 1, 2 * scale
    told = state["middle_block.0.emb_layers.1.weight"].shape[0]
    labels = state.get("label_emb.weight")
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "model_channels": base,
        "out_channels": state["out.2.weight"].shape[0],
        "num_res_blocks": per_level,
        "attention_downsampling": tuple(sorted(attention)),
        "channel_mult": tuple(width // base for width in widths),
        "num_classes": None if labels is None else labels.shape[0],
        "use_scale_shift_norm": told == 2 * state["middle_block.0.in_layers.2.weight"].shape[0],
        "resblock_updown": residual_resampling,
    }


def _res_blocks(state: Mapping[str, Tensor]) -> int:
    """Residual blocks per level n: the n + 1 output blocks of the lowest level end with the first that up-samples."""
    number = 0
    while f"output_blocks.{number}.0.in_layers.2.weight" in state:
        for part in (1, 2):
            prefix = f"output_blocks.{number}.{part}"
            if f"{prefix}.conv.weight" in state or f"{prefix}.in_layers.2.weight" in state:
                return number
        number += 1
    return number - 1
