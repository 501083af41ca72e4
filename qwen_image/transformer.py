"""The Qwen-Image diffusion transformer (MMDiT). Parameter names are those of the official checkpoints."""
# B batch, C channels, T images of the target, H W latent positions, h w tokens of an image, L tokens of all images,
# S text tokens, J = S + L, N heads, D and E widths of a head and of all

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.blocks import Run, run_blocks
from ..core.ops.attention import attention
from ..core.ops.embed import timestep_embedding
from ..core.ops.linear import Linear
from ..core.ops.norm import RMSNorm, gated_add, modulate
from ..core.ops.rope import rotate
from .config import PATCH, TOKEN_PIXELS, QwenImageConfig
from .positions import Rope, image_frames, joint_rope, text_start

Made = TypeVar("Made")
Streams = tuple[Tensor, Tensor]  # images [B, L, E] and text [B, S, E]
Parts = tuple[tuple[slice, Tensor], ...]  # (rows of a stream, their six modulation vectors [B, 6, E]), in order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """One prompt as the blocks see it: its embedded rows, and which of them are padding that no token attends to.

    Made by `QwenImageTransformer.prompt`; serves every step of a run. Without padding `key_bias_BS` is None.
    """

    rows_BSE: Tensor
    key_bias_BS: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pass:
    """What steers one pass through the blocks: `references` are normalised latents [B or 1, C, 1, H', W']."""

    prompt: Prompt
    references: Sequence[Tensor] = ()


class Modulations:
    """What a timestep makes of the weights: its embedding, and each block's modulation once that block has met it.

    Made by `QwenImageTransformer.modulations` and lent to every forward of a run, so that the guidance passes of a
    step share it: the modulation layers are a third of all weights. It holds the timestep it saw last, and the
    positions of the tokens, which no timestep changes.
    """

    def __init__(self) -> None:
        self._timestep: tuple[float, ...] = ()
        self._made: dict[object, object] = {}
        self._lasting: dict[object, object] = {}

    def turn_to(self, timestep_B: Tensor) -> None:
        """Forget everything if the timestep is another than last time's."""
        timestep = tuple(timestep_B.tolist())
        if timestep != self._timestep:
            self._timestep, self._made = timestep, {}

    def of(self, key: object, make: Callable[[], Made]) -> Made:
        """Return what `make` gives for this timestep, calling it the first time only."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def always(self, key: object, make: Callable[[], Made]) -> Made:
        """Return what `make` gives for any timestep, calling it the first time only."""
        if key not in self._lasting:
            self._lasting[key] = make()
        return self._lasting[key]  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Joint:
    """What all blocks of one forward share: positions, hidden keys, and the dtype of the large products."""

    txt_rope: Rope
    img_rope: Rope
    key_bias_BJ: Tensor | None
    dtype: torch.dtype


class QwenImageTransformer(nn.Module):
    """Predict the flow velocity (noise - clean latent) of a noisy latent. Source: Qwen-Image report, section 2."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.img_in = Linear(config.token_dim, dim)
        self.txt_norm = RMSNorm(config.text_dim, config.eps)
        self.txt_in = Linear(config.text_dim, dim)
        self.time_text_embed = TimeEmbedding(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = OutputModulation(dim)
        self.proj_out = Linear(dim, config.token_dim)

    def prompt(self, text_BSE: Tensor, run: Run, valid_BS: Tensor | None = None) -> Prompt:
        """Embed text encoder rows [B, S, text_dim]; those where `valid_BS` is False are padding that nobody attends to.

        Positions run over the padded length. One prompt serves a batch of latents.
        """
        rows = self.txt_in(self.txt_norm(text_BSE).to(run.dtype)).float()
        if valid_BS is None or bool(valid_BS.all()):
            return Prompt(rows_BSE=rows, key_bias_BS=None)
        hidden = torch.zeros(valid_BS.shape, device=rows.device).masked_fill_(
            ~valid_BS.bool().to(rows.device), float("-inf")
        )
        return Prompt(rows_BSE=rows, key_bias_BS=hidden)

    def modulations(self) -> Modulations:
        """Return an empty store for a run to lend to each of its forwards. It serves this model's weights only."""
        return Modulations()

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        prompt: Prompt,
        run: Run,
        references: Sequence[Tensor] = (),
        modulations: Modulations | None = None,
    ) -> Tensor:
        """Return the velocity [B, C, T, H, W] of the target in float32 for timesteps in [0, 1000].

        `x_BCTHW` are T normalised latents of one size, `references` normalised latents [B or 1, C, 1, H', W'], each of
        its own even size. Without `modulations` all is computed inline. Raises ValueError for odd sizes.
        """
        steered = Pass(prompt=prompt, references=references)
        return self.velocities(x_BCTHW, timestep_B, [steered], run, modulations)[0]

    def velocities(
        self,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        passes: Sequence[Pass],
        run: Run,
        modulations: Modulations | None = None,
    ) -> list[Tensor]:
        """Return the velocity of each pass, as `forward` does; all of them pass a block before the next one."""
        lent = Modulations() if modulations is None else modulations
        lent.turn_to(timestep_B)
        time = lent.of("time", lambda: F.silu(self.time_text_embed(timestep_B, x_BCTHW.device)))
        joints = [self._joint(x_BCTHW, steered, run, lent) for steered in passes]
        grid, frames = _grid(x_BCTHW), x_BCTHW.shape[2]
        num_target, last = frames * grid[0] * grid[1], self.config.num_layers - 1

        def call(i: int, block: Block, streams: list[Streams]) -> list[Streams]:
            img_mod, txt_mod = lent.of(i, lambda: block.modulation(time.to(run.dtype)))
            txt_parts, keep = ((slice(None), txt_mod),), num_target if i == last else None
            return [
                block(
                    *stream,
                    self._image_parts(img_mod, num_target if steered.references else None),
                    txt_parts,
                    joint,
                    keep,
                )
                for stream, steered, joint in zip(streams, passes, joints, strict=True)
            ]

        streams = [self._streams(x_BCTHW, steered) for steered in passes]
        streams = run_blocks(self.transformer_blocks, streams, call, run=run, name="transformer_blocks")
        modulation = lent.of("out", lambda: self.norm_out(time[: len(timestep_B)]))
        return [self._head(img, modulation, grid, frames) for img, _ in streams]

    def _streams(self, x_BCTHW: Tensor, steered: Pass) -> Streams:
        """Return images and text as the first block takes them.

        In float32: they grow beyond float16, and bfloat16 would round each small addition away.
        """
        batch = x_BCTHW.shape[0]
        tokens = [_tokens(image).expand(batch, -1, -1) for image in (x_BCTHW, *steered.references)]
        return self.img_in(torch.cat(tokens, dim=1).float()), steered.prompt.rows_BSE.expand(batch, -1, -1)

    def _head(self, img_BLE: Tensor, modulation: tuple[Tensor, Tensor], grid: tuple[int, int], frames: int) -> Tensor:
        scale, shift = modulation
        out = self.proj_out(modulate(img_BLE, shift, scale, self.config.eps))
        (h, w), p = grid, PATCH
        return rearrange(out, "b (t h w) (c p q) -> b c t (h p) (w q)", t=frames, h=h, w=w, p=p, q=p)

    def _joint(self, x_BCTHW: Tensor, steered: Pass, run: Run, lent: Modulations) -> Joint:
        """Return what the blocks share of a pass. Raises ValueError for odd sizes."""
        frames = x_BCTHW.shape[2]
        grids = [_grid(x_BCTHW)] * frames + [_grid(image) for image in steered.references]
        rows, bias = steered.prompt.rows_BSE, steered.prompt.key_bias_BS
        layered = self.config.layered
        start = text_start(grids, layered)
        numbers = image_frames(frames, len(grids) - frames, layered)
        text = range(start, start + rows.shape[1])
        txt_rope, img_rope = lent.always(
            (*grids, *numbers, text), lambda: joint_rope(grids, numbers, text, self.config.axes, rows.device)
        )
        if bias is not None:
            bias = F.pad(bias, (0, len(img_rope[0])))
        return Joint(txt_rope=txt_rope, img_rope=img_rope, key_bias_BJ=bias, dtype=run.dtype)

    def _image_parts(self, modulation: Tensor, first_reference: int | None) -> Parts:
        """Divide the image rows: where the model treats references as clean pictures, they follow the row of time 0."""
        if not self.config.zero_cond_t:
            return ((slice(None), modulation),)
        if first_reference is None:
            return ((slice(None), modulation[:-1]),)
        return (slice(0, first_reference), modulation[:-1]), (slice(first_reference, None), modulation[-1:])


class TimeEmbedding(nn.Module):
    """Embed the timestep; for a model with `zero_cond_t` one more row, last, embeds time 0. All in float32."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.freq_dim, self.zero_cond_t = config.freq_dim, config.zero_cond_t
        self.timestep_embedder = TimeMLP(config.freq_dim, config.dim)
        # Row 0 is added for every picture that people make; what row 1 was trained for is not published.
        self.addition_t_embedding = nn.Embedding(2, config.dim) if config.layered else None

    def forward(self, timestep_B: Tensor, device: torch.device) -> Tensor:
        if self.zero_cond_t:
            timestep_B = F.pad(timestep_B, (0, 1))
        time_BE = self.timestep_embedder(timestep_embedding(timestep_B, self.freq_dim).to(device))
        return time_BE if self.addition_t_embedding is None else time_BE + self.addition_t_embedding.weight[0].float()


class TimeMLP(nn.Module):
    """Two layers on the sinusoids of the timestep."""

    def __init__(self, freq_dim: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(freq_dim, dim), Linear(dim, dim)

    def forward(self, sinusoids_BF: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids_BF)))


class OutputModulation(nn.Module):
    """Scale and shift of the last norm, each [B, 1, E]: in this order, unlike the blocks."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, silu_time_BE: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.linear(silu_time_BE)[:, None].chunk(2, dim=-1)
        return scale, shift


class Block(nn.Module):
    """Joint attention over text and images, then a feed-forward of each; every branch is modulated and gated."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.eps = config.eps
        self.zero_cond_t = config.zero_cond_t
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(config.dim, 6 * config.dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(config.dim, 6 * config.dim))
        self.attn = JointAttention(config)
        self.img_mlp = FeedForward(config.dim, config.ffn_dim)
        self.txt_mlp = FeedForward(config.dim, config.ffn_dim)

    def modulation(self, silu_time_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift, scale and gate of attention, then of feed-forward, [B, 6, E] float32, of images and text.

        The SiLU of the time embedding is the same for all blocks, so it comes done. A row of time 0, last, is for
        images only.
        """
        img, txt = silu_time_BE, silu_time_BE[:-1] if self.zero_cond_t else silu_time_BE
        img_mod, txt_mod = (
            mod[1](time).float().unflatten(-1, (6, -1)) for mod, time in ((self.img_mod, img), (self.txt_mod, txt))
        )
        return img_mod, txt_mod

    def forward(
        self, img: Tensor, txt: Tensor, img_parts: Parts, txt_parts: Parts, joint: Joint, keep: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return both streams, [B, L, E] and [B, S, E]. With `keep`, only so many image rows are read afterwards.

        Then the other rows serve as keys and values alone, and the text returns as it came.
        """
        img_out, txt_out = self.attn(
            _modulated(img, img_parts, 0, self.eps, joint.dtype),
            _modulated(txt, txt_parts, 0, self.eps, joint.dtype),
            joint,
            keep,
        )
        if keep is None:
            txt = self._feed_forward(_gated(txt, txt_out, txt_parts, 2), self.txt_mlp, txt_parts, joint)
        else:
            img, img_parts = img[:, :keep], img_parts[:1]
        return self._feed_forward(_gated(img, img_out, img_parts, 2), self.img_mlp, img_parts, joint), txt

    def _feed_forward(self, x: Tensor, mlp: nn.Module, parts: Parts, joint: Joint) -> Tensor:
        return _gated(x, mlp(_modulated(x, parts, 3, self.eps, joint.dtype)), parts, 5)


class JointAttention(nn.Module):
    """Full attention over text and images, text first, each with its own projections; q and k have a norm per head."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        dim, self.heads = config.dim, config.num_heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.to_add_out = Linear(dim, dim)
        width = dim // config.num_heads
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (RMSNorm(width, config.eps) for _ in range(4))

    def forward(self, img_BLE: Tensor, txt_BSE: Tensor, joint: Joint, keep: int | None) -> tuple[Tensor, Tensor | None]:
        """Return what the image rows and the text rows gather; with `keep` that of the first `keep` image rows only."""
        txt_rope, img_rope, dtype = joint.txt_rope, joint.img_rope, joint.dtype
        k = torch.cat(
            (
                rotate(self.norm_added_k(self._heads(self.add_k_proj(txt_BSE))), txt_rope).to(dtype),
                rotate(self.norm_k(self._heads(self.to_k(img_BLE))), img_rope).to(dtype),
            ),
            dim=1,
        )
        v = self._heads(torch.cat((self.add_v_proj(txt_BSE), self.to_v(img_BLE)), dim=1))
        if keep is not None:
            img_rope = (img_rope[0][:keep], img_rope[1][:keep])
        q = rotate(self.norm_q(self._heads(self.to_q(img_BLE[:, :keep]))), img_rope).to(dtype)
        if keep is not None:
            return self.to_out[0](attention(q, k, v, joint.key_bias_BJ).flatten(2)), None
        q_txt = rotate(self.norm_added_q(self._heads(self.add_q_proj(txt_BSE))), txt_rope).to(dtype)
        out = attention(torch.cat((q_txt, q), dim=1), k, v, joint.key_bias_BJ).flatten(2)
        num_text = txt_BSE.shape[1]
        return self.to_out[0](out[:, num_text:]), self.to_add_out(out[:, :num_text])

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (n d) -> b l n d", n=self.heads)


class Projection(nn.Module):
    """The first layer of a feed-forward, which the official names put one level deeper."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.proj = Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FeedForward(nn.Module):
    """Two layers with a GELU (tanh form) between them."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.net = nn.Sequential(Projection(dim, ffn_dim), nn.GELU("tanh"), Linear(ffn_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _grid(image_BCTHW: Tensor) -> tuple[int, int]:
    height, width = image_BCTHW.shape[-2:]
    if height % PATCH or width % PATCH or not height or not width:
        raise ValueError(
            f"Qwen-Image latents must divide into patches of {PATCH} x {PATCH}, got {width} x {height} positions: make"
            f" width and height of the picture multiples of {TOKEN_PIXELS} pixels"
        )
    return height // PATCH, width // PATCH


def _tokens(image_BCTHW: Tensor) -> Tensor:
    """Return the patches of all images in raster order, [B, t*h*w, C*4]; in a token the channel is slowest."""
    return rearrange(image_BCTHW, "b c t (h p) (w q) -> b (t h w) (c p q)", p=PATCH, q=PATCH)


def _modulated(x: Tensor, parts: Parts, first: int, eps: float, dtype: torch.dtype) -> Tensor:
    """Return each part of the rows modulated by its shift and scale, vectors `first` and `first + 1` of the six."""
    done = [
        modulate(x[:, rows], mod[:, first : first + 1], mod[:, first + 1 : first + 2], eps).to(dtype)
        for rows, mod in parts
    ]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def _gated(x: Tensor, branch: Tensor, parts: Parts, gate: int) -> Tensor:
    """Return the rows with their branch added, each part gated by vector `gate` of its six."""
    done = [gated_add(x[:, rows], branch[:, rows], mod[:, gate : gate + 1]) for rows, mod in parts]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)
