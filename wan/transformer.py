"""The Wan 2.1 diffusion transformer. Parameter names are those of the official checkpoints."""
# B batch, C channels, T H W latent grid, t h w token grid, L = t*h*w tokens, S text or image tokens, N heads, D and E
# widths of a head and of all

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.blocks import Run, run_blocks
from ..core.ops.attention import attention, attention_in_place
from ..core.ops.embed import timestep_embedding
from ..core.ops.linear import Linear, feed_forward
from ..core.ops.norm import LayerNorm, RMSNorm, modulate
from ..core.ops.rope import grid_rope, rotate
from ..core.ops.rows import add_to_rows, row_chunks
from .config import WanConfig

Rope = tuple[Tensor, Tensor]
Keys = tuple[Tensor, Tensor, Tensor | None]  # keys and values [B, S, N, D], and a bias of the keys [B, S]

# Up to so many tokens the keys and values of a prompt are kept for all steps: 0.4 GB in the 14B. With more tokens
# making them anew is a thousandth of the work.
TOKENS_THAT_KEEP_KEYS = 8192
IMAGE_EPS = 1e-5  # of the norms around the image rows; all others take the config's


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shared:
    """What all blocks and passes of one forward share: the time, the positions, and how the tokens are divided."""

    time_B6E: Tensor
    rope: Rope
    chunks: tuple[slice, ...]


class Prompt:
    """One prompt as the blocks see it: its embedded rows, and the keys and values that blocks asked it to keep.

    `image_BSE` are the embedded rows of its picture, `extra_BCTHW` the channels that join the latent's, where the model
    takes them. Made by `WanTransformer.prompt`; serves every step of a run, and both guidance passes where all of this
    is equal.
    """

    def __init__(
        self,
        rows_BSE: Tensor,
        key_bias_BS: Tensor | None = None,
        image_BSE: Tensor | None = None,
        extra_BCTHW: Tensor | None = None,
    ):
        self.rows_BSE = rows_BSE
        self.key_bias_BS = key_bias_BS
        self.image_BSE = image_BSE
        self.extra_BCTHW = extra_BCTHW
        self._keys_values: dict[int, list[Keys]] = {}

    def keys_values(self, i: int, cross_attn: "CrossAttention", keep: bool) -> list[Keys]:
        """Return what tokens attend to in block i, text and picture; with `keep` it is computed the first time only."""
        if i in self._keys_values:
            return self._keys_values[i]
        made: list[Keys] = [(*cross_attn.keys_values(self.rows_BSE), self.key_bias_BS)]
        if self.image_BSE is not None:
            made.append((*cross_attn.image_keys_values(self.image_BSE), None))
        if keep:
            self._keys_values[i] = made
        return made

    def join(self, x_BCTHW: Tensor) -> Tensor:
        """Return the latent with the prompt's extra channels after its own."""
        extra = self.extra_BCTHW
        if extra is None:
            return x_BCTHW
        assert extra.shape[2:] == x_BCTHW.shape[2:]
        return torch.cat((x_BCTHW, extra.expand(x_BCTHW.shape[0], -1, -1, -1, -1)), dim=1)


class WanTransformer(nn.Module):
    """Predict the flow velocity (noise - clean latent) of a noisy latent. Source: Wan 2.1 report, section 4.2."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def prompt(
        self,
        text_BSE: Tensor,
        run: Run,
        key_bias_BS: Tensor | None = None,
        image_BSC: Tensor | None = None,
        extra_BCTHW: Tensor | None = None,
    ) -> Prompt:
        """Embed text encoder rows [B, S, text_dim]; fewer than `text_len` rows are filled up with zeros.

        The zero rows are keys like any other: the model was trained to attend them, so they are never masked.
        With `key_bias_BS` the rows are taken as they are, each key's logit raised by its bias: one zero row with bias
        ln(n) stands for n of them. Models of pictures also take `image_BSC`, image encoder rows, and `extra_BCTHW`,
        channels that join the latent's. Raises ValueError for too many text rows.
        """
        config = self.config
        assert (image_BSC is not None) == bool(config.image_dim) and (extra_BCTHW is not None) == bool(config.extra_dim)
        if text_BSE.shape[1] > self.config.text_len:
            raise ValueError(
                f"Wan takes at most {self.config.text_len} text rows, got {text_BSE.shape[1]}: truncate the prompt"
            )
        if key_bias_BS is None:
            text_BSE = F.pad(text_BSE, (0, 0, 0, self.config.text_len - text_BSE.shape[1]))
        image_BSE = None if image_BSC is None else self.img_emb(image_BSC, run.dtype)
        return Prompt(self.text_embedding(text_BSE.to(run.dtype)), key_bias_BS, image_BSE, extra_BCTHW)

    def forward(self, x_BCTHW: Tensor, timestep_B: Tensor, prompt: Prompt, run: Run) -> Tensor:
        """Return the velocity [B, out_dim, T, H, W] in float32 for timesteps in [0, 1000]."""
        return self.velocities(x_BCTHW, timestep_B, [prompt], run)[0]

    def velocities(self, x_BCTHW: Tensor, timestep_B: Tensor, prompts: Sequence[Prompt], run: Run) -> list[Tensor]:
        """Return the velocity with each prompt, as `forward` does; all of them pass a block before the next one."""
        grid = self.patch_embedding.grid(x_BCTHW)
        num_tokens = math.prod(grid)
        time = timestep_embedding(timestep_B, self.config.freq_dim).to(x_BCTHW.device)
        time_B1E = self.time_embedding(time)[:, None]
        shared = Shared(
            time_B6E=rearrange(self.time_projection(time_B1E), "b 1 (m e) -> b m e", m=6),
            rope=self.rope(grid, x_BCTHW.device),
            chunks=row_chunks(num_tokens, run.chunk_rows),
        )
        keep = num_tokens <= TOKENS_THAT_KEEP_KEYS

        def call(i: int, block: Block, streams: list[Tensor]) -> list[Tensor]:
            return [
                block(x, shared, prompt.keys_values(i, block.cross_attn, keep))
                for x, prompt in zip(streams, prompts, strict=True)
            ]

        streams = [self.patch_embedding(prompt.join(x_BCTHW), run.dtype) for prompt in prompts]
        streams = run_blocks(self.blocks, streams, call, run=run)
        return [self.head(x, time_B1E, grid, shared.chunks) for x in streams]

    def rope(self, grid: tuple[int, int, int], device: torch.device) -> Rope:
        """Return the rotation tables of a token grid; the head width is split 44 + 42 + 42 over t, y, x (of 128)."""
        width = self.config.dim // self.config.num_heads
        space = 2 * (width // 6)
        widths = (width - 2 * space, space, space)
        return grid_rope([(torch.arange(size), w) for size, w in zip(grid, widths, strict=True)], device)


class PatchEmbedding(nn.Module):
    """Turn each patch into a token. The weight is that of a 3-D convolution with stride equal to its kernel."""

    def __init__(self, in_dim: int, dim: int, patch: tuple[int, int, int]):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *patch))
        self.bias = nn.Parameter(torch.empty(dim))

    def grid(self, x_BCTHW: Tensor) -> tuple[int, int, int]:
        """Return the tokens along time, height and width. Raises ValueError for sizes that leave a rest."""
        if any(size % p for size, p in zip(x_BCTHW.shape[2:], self.patch, strict=True)):
            raise ValueError(f"Wan latents must divide into patches of {self.patch}, got {tuple(x_BCTHW.shape[2:])}")
        t, h, w = (size // p for size, p in zip(x_BCTHW.shape[2:], self.patch, strict=True))
        return t, h, w

    def forward(self, x_BCTHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Return tokens [B, L, E] in float32, computed in `dtype`."""
        pt, ph, pw = self.patch
        patches = rearrange(x_BCTHW, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return F.linear(patches.to(dtype), self.weight.flatten(1).to(dtype), self.bias.to(dtype)).float()


class ImageEmbedding(nn.Module):
    """Turn rows of the image encoder into tokens that blocks attend to.

    Rows of the models of two pictures have positions; one picture's rows take the first of them.
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        width, dim = config.image_dim, config.dim
        self.proj = nn.Sequential(
            LayerNorm(width, IMAGE_EPS), Linear(width, width), nn.GELU(), Linear(width, dim), LayerNorm(dim, IMAGE_EPS)
        )
        positions = torch.empty(1, config.image_positions, width) if config.image_positions else None
        self.emb_pos = None if positions is None else nn.Parameter(positions)

    def forward(self, rows_BSC: Tensor, dtype: torch.dtype) -> Tensor:
        """Return tokens [B, S, E] in `dtype`, in which the products are computed."""
        norm_in, widen, activation, narrow, norm_out = self.proj
        rows = rows_BSC.float()
        if self.emb_pos is not None:
            rows = rows + self.emb_pos[:, : rows.shape[1]].float()
        return norm_out(narrow(activation(widen(norm_in(rows).to(dtype))))).to(dtype)


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
        project, attend = self.self_attn.o.at(dtype), self.cross_attn.at(dtype)
        feed = feed_forward(self.ffn[0], self.ffn[2], dtype)
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
        to_q, to_k, to_v = (layer.at(dtype) for layer in (self.q, self.k, self.v))
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

    def at(self, dtype: torch.dtype) -> Callable[[Tensor, Sequence[Keys]], Tensor]:
        """Return the attention as a function of tokens [B, L, E] and what they attend to, the results being added."""
        to_q, project = self.q.at(dtype), self.o.at(dtype)

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


class Head(nn.Module):
    """Modulate by time, project each token to its patch of velocity, and lay the patches out. All in float32."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps, self.patch = config.eps, config.patch_size
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.head = Linear(
            config.dim, config.out_dim * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        )

    def forward(self, x_BLE: Tensor, time_B1E: Tensor, grid: tuple[int, int, int], chunks: tuple[slice, ...]) -> Tensor:
        shift, scale = (self.modulation.float() + time_B1E).split(1, dim=1)
        parts = [self.head(modulate(x_BLE[:, rows], shift, scale, self.eps)) for rows in chunks]
        patches = torch.cat(parts, dim=1)
        (t, h, w), (pt, ph, pw) = grid, self.patch
        # Output patches are (pt, ph, pw, c) with c fastest; input patches are (c, pt, ph, pw).
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
