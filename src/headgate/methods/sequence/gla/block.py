r"""One block of the language models, with RMS norm N in front of both mixers:

.. math:: y = x + \mathrm{GLA}(N_1(x)), \qquad z = y + \mathrm{SwiGLU}(N_2(y)).

(The paper's equation, arXiv 2312.06635 section 4.4, adds x in the second sum: a slip; all code adds y.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headgate.methods.sequence.gla.cache import GLACache, GLAState
from headgate.methods.sequence.gla.feed_forward import SwiGLU
from headgate.methods.sequence.gla.initialization import initialize
from headgate.methods.sequence.gla.layer import GatedLinearAttention
from headgate.methods.sequence.gla.padding import Packing
from headgate.nn import RMSNorm
from headgate.validate import check_floating, check_shape

__all__ = ["GLABlock"]


class GLABlock(nn.Module):
    """Gated linear attention over the tokens, SwiGLU over the channels, each behind an RMS norm and with a residual.

    Args:
        dim: channels.
        num_heads: heads.
        hidden_dim: width of the SwiGLU; default ``256 · ceil(⌊8 dim / 3⌋ / 256)``.
        norm_eps: ε of all norms.
        **attention: further keywords of :class:`GatedLinearAttention`.
    """

    def __init__(
        self,
        dim: int = 1024,
        num_heads: int = 4,
        hidden_dim: int | None = None,
        norm_eps: float = 1e-6,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(dim, eps=norm_eps)
        self.attn = GatedLinearAttention(dim, num_heads, norm_eps=norm_eps, **attention)
        self.mlp_norm = RMSNorm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, hidden_dim)
        self.mlp.apply(initialize)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        cache: GLACache | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
        *,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Apply the block; arguments as in :meth:`GatedLinearAttention.forward`.

        Returns:
            ``(batch, length, dim)``; what stands at padding means nothing.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape or mask, no tokens, or a cache of another batch.
        """
        check_shape("x", x, (None, None, self.attn.dim), "batch, length, dim")
        check_floating("x", x, like=self.attn_norm.weight.dtype)
        y = x + self.attn(self.attn_norm(x), attention_mask, cache, cu_seqlens, packing=packing)
        return y + self.mlp(self.mlp_norm(y))

    def recomputed(
        self, x: Float[Tensor, "batch length dim"], cache: GLACache | None = None, packing: Packing | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """The same under gradient checkpointing: the backward pass computes the block's insides a second time.

        Args:
            x: ``(batch, length, dim)``.
            cache: the states of the sequences. The second time must find them as they were the first time, so the block
                works on a cache of its own, and what it leaves there is written to this one outside.
            packing: as in :meth:`forward`.
        """
        if cache is None:
            return self._gradient_checkpointing_func(functools.partial(self, packing=packing), x)
        index = self.attn.layer_idx
        past = cache[index]
        tokens = 0

        def run(x: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
            nonlocal tokens
            own = GLACache()
            if before:
                own.write(index, GLAState(before[0], before[1:]), 0)
            y = self(x, cache=own, packing=packing)
            after, tokens = own[index], own.get_seq_length(index)
            assert after is not None
            return y, after.memory, *after.recent

        before = () if past is None else (past.memory, *past.recent)
        y, memory, *recent = self._gradient_checkpointing_func(run, x, *before)
        cache.write(index, GLAState(memory, tuple(recent)), tokens)
        return y

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens."""
        return self.attn.state_size(length)
