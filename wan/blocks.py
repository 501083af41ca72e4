"""The blocks of the Wan 2.1 diffusion transformer. Parameter names are those of the official checkpoints."""
# B batch, L tokens, S text or image tokens, N heads, D and E widths of a head and of all

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..core.ops.attention import attention, attention_in_place
from ..core.ops.linear import Linear, feed_forward
from ..core.ops.norm import LayerNorm, RMSNorm, modulate
from ..core.ops.rope import rotate
from ..core.ops.rows import add_to_rows
from .config import WanConfig

Rope = tuple[Tensor, Tensor]
Keys = tuple[Tensor, Tensor, Tensor | None]  # keys and values [B, S, N, D], and a bias of the keys [B, S]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shared:
    """What all blocks and passes of one forward share: the time, the positions, and how the tokens are divided."""

    time_B6E: Tensor
    rope: Rope
    chunks: tuple[slice, ...]


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; the first and last are modulated by time.

    Without gradients the tokens given to it are changed.
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor, shared: Shared, prompt: Sequence[Keys]) -> Tensor:
        dtype, modulation = prompt[0][0].dtype, self.modulation.float() + shared.time_B6E
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation.split(1, dim=1)
        gathered = self.self_attn(x, lambda part: modulate(part, shift_sa, scale_sa, self.eps).to(dtype), shared, dtype)
        num_rows = x.shape[0] * x.shape[1]
        project, attend = self.self_attn.o.at(dtype, num_rows), self.cross_attn.at(dtype, num_rows)
        feed = feed_forward(self.ffn[0], self.ffn[2], dtype, num_rows)
        for rows in shared.chunks:
            x = add_to_rows(x, rows, project(gathered[:, rows]), gate_sa)
            # The cross-attention is neither modulated nor gated.
            x = add_to_rows(x, rows, attend(self.norm3(x[:, rows]).to(dtype), prompt))
            x = add_to_rows(x, rows, feed(modulate(x[:, rows], shift_ff, scale_ff, self.eps).to(dtype)), gate_ff)
        return x


class SelfAttention(nn.Module):
    """Full attention over all tokens; q and k are normalised over the whole width, before the heads are split."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))

    def forward(self, x_BLE: Tensor, norm: Callable[[Tensor], Tensor], shared: Shared, dtype: torch.dtype) -> Tensor:
        """Return what each token of `norm(x)` gathers [B, L, E], not yet projected by `o`."""
        batch, length, width = x_BLE.shape
        shape = batch, length, self.heads, width // self.heads
        q, k, v = (torch.empty(shape, dtype=dtype, device=x_BLE.device) for _ in range(3))
        to_q, to_k, to_v = (layer.at(dtype, batch * length) for layer in (self.q, self.k, self.v))
        for rows in shared.chunks:
            part, rope = norm(x_BLE[:, rows]), (shared.rope[0][rows], shared.rope[1][rows])
            q[:, rows] = rotate(self._split(self.norm_q(to_q(part))), rope)
            k[:, rows] = rotate(self._split(self.norm_k(to_k(part))), rope)
            v[:, rows] = self._split(to_v(part))
        return attention_in_place(q, k, v).flatten(2)

    def _split(self, x_BLE: Tensor) -> Tensor:
        return rearrange(x_BLE, "b l (n d) -> b l n d", n=self.heads)


class CrossAttention(nn.Module):
    """Attention from the tokens to the prompt, without positions; to its picture, if any, apart from its text."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))
        if config.image_dim:
            self.k_img, self.v_img = (Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def keys_values(self, rows_BSE: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.norm_k(self.k(rows_BSE)).to(rows_BSE.dtype)), self._split(self.v(rows_BSE))

    def image_keys_values(self, rows_BSE: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.norm_k_img(self.k_img(rows_BSE)).to(rows_BSE.dtype)), self._split(self.v_img(rows_BSE))

    def at(self, dtype: torch.dtype, num_rows: int) -> Callable[[Tensor, Sequence[Keys]], Tensor]:
        """Return the attention as a function of tokens [B, L, E] and what they attend to, the results being added.

        `num_rows` is how many tokens all calls together bring.
        """
        to_q, project = self.q.at(dtype, num_rows), self.o.at(dtype, num_rows)

        def attend(x_BLE: Tensor, prompt: Sequence[Keys]) -> Tensor:
            q = self._split(self.norm_q(to_q(x_BLE)).to(dtype))
            text, *pictures = prompt
            gathered = attention(q, *text)
            for picture in pictures:  # a softmax of its own
                gathered = gathered + attention(q, *picture)
            return project(gathered.flatten(2))

        return attend

    def _split(self, rows_BSE: Tensor) -> Tensor:
        return rearrange(rows_BSE, "b s (n d) -> b s n d", n=self.heads)
