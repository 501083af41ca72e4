"""The blocks of the Wan 2.1 diffusion transformer. Parameter names are those of the official checkpoints."""
# B batch, L tokens, S text or image tokens, N heads, D and E widths of a head and of all

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..core.ops.attention import attention_in_place
from ..core.ops.choice import Ops
from ..core.ops.linear import Linear, feed_forward
from ..core.ops.norm import LayerConstants, LayerNorm, RMSNorm, modulated_by
from ..core.ops.products import round_once
from .config import WanConfig

Rope = tuple[Tensor, Tensor]
Keys = tuple[Tensor, Tensor, Tensor | None]  # keys and values [B, S, N, D], and a bias of the keys [B, S]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shared:
    """What all blocks and passes of one forward share: time, positions, how tokens are divided and `ops` spelled."""

    time_B6E: Tensor
    rope: Rope
    chunks: tuple[slice, ...]
    ops: Ops


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
        dtype, modulations = prompt[0][0].dtype, self.modulation.float() + shared.time_B6E
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulations.split(1, dim=1)
        gathered = self.self_attn(x, modulated_by(shift_sa, scale_sa, self.eps), shared, dtype)
        num_rows, ops = x.shape[0] * x.shape[1], shared.ops
        project, attend = self.self_attn.o.at(dtype, num_rows, ops.products), self.cross_attn.at(dtype, num_rows, ops)
        feed = feed_forward(self.ffn[0], self.ffn[2], dtype, num_rows, ops.products)
        # The cross-attention is neither modulated nor gated.
        cross, modulated = self.norm3.constants, modulated_by(shift_ff, scale_ff, self.eps)
        for rows in shared.chunks:
            x, normed = ops.add_norm(x, rows, project(gathered[:, rows]), gate_sa, cross, dtype)
            x, normed = ops.add_norm(x, rows, attend(normed, prompt), None, modulated, dtype)
            x = ops.add_to_rows(x, rows, feed(normed), gate_ff)
        return x


class SelfAttention(nn.Module):
    """Full attention over all tokens; q and k are normalised over the whole width, before the heads are split."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))

    def forward(self, x_BLE: Tensor, norm: LayerConstants, shared: Shared, dtype: torch.dtype) -> Tensor:
        """Return what each token of x, normed, gathers [B, L, E], not yet projected by `o`."""
        batch, length, width = x_BLE.shape
        shape = batch, length, self.heads, width // self.heads
        q, k, v = (torch.empty(shape, dtype=dtype, device=x_BLE.device) for _ in range(3))
        norm_rotate, products = shared.ops.norm_rotate, shared.ops.products
        to_q, to_k, to_v = (layer.at(dtype, batch * length, products) for layer in (self.q, self.k, self.v))
        for rows in shared.chunks:
            part = round_once(shared.ops.layer_norm(x_BLE[:, rows], norm, dtype), to_q, to_k, to_v)
            rope = shared.rope[0][rows], shared.rope[1][rows]
            norm_rotate(to_q(part), self.norm_q.constants, rope, q[:, rows])
            norm_rotate(to_k(part), self.norm_k.constants, rope, k[:, rows])
            v[:, rows] = rearrange(to_v(part), "b l (n d) -> b l n d", n=self.heads)
        return attention_in_place(q, k, v, attend=shared.ops.attention).flatten(2)


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

    def at(self, dtype: torch.dtype, num_rows: int, ops: Ops) -> Callable[[Tensor, Sequence[Keys]], Tensor]:
        """Return the attention as a function of tokens [B, L, E] and what they attend to, the results being added.

        `num_rows` is how many tokens all calls together bring.
        """
        to_q, project = (layer.at(dtype, num_rows, ops.products) for layer in (self.q, self.o))

        # torch.compile takes no annotations here: they are evaluated in the middle of the block.
        def attend(x_BLE, prompt):
            q = self._split(ops.rms_norm(to_q(x_BLE), self.norm_q.constants, dtype))
            text, *pictures = prompt
            gathered = ops.attention(q, *text)
            for picture in pictures:  # a softmax of its own
                gathered = gathered + ops.attention(q, *picture)
            return project(gathered.flatten(2))

        return attend

    def _split(self, rows_BSE: Tensor) -> Tensor:
        return rearrange(rows_BSE, "b s (n d) -> b s n d", n=self.heads)
