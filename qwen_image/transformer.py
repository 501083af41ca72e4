"""The Qwen-Image diffusion transformer (MMDiT). Parameter names are those of the official checkpoints."""
# B batch, C channels, T images of the target, H W latent positions, h w tokens of an image, L tokens of all images,
# S text tokens, J = S + L, N heads, D and E widths of a head and of all

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.blocks import Run, run_blocks
from ..core.ops.attention import attention_in_place
from ..core.ops.choice import Ops
from ..core.ops.embed import timestep_embedding
from ..core.ops.linear import Linear, feed_forward
from ..core.ops.norm import RMSNorm, modulate, modulated_by
from ..core.ops.products import Product, round_once
from ..core.ops.rows import row_chunks
from ..core.ops.sent import sent
from .config import PATCH, TOKEN_PIXELS, QwenImageConfig
from .positions import Rope, image_frames, joint_rope, text_start

Made = TypeVar("Made")
Streams = tuple[Tensor, Tensor]  # images [B, L, E] and text [B, S, E]
Chunks = tuple[slice, ...]
Parts = tuple[tuple[slice, Tensor], ...]  # (some rows of a stream, their six modulation vectors [B, 6, E])
NormedRows = Iterator[tuple[slice, Tensor]]  # (some rows of a stream, those rows modulated)


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
    """What all blocks share of a pass: positions, hidden keys, the dtype of the large products, how `ops` are spelled.

    And how the rows are divided: those of the text, and of the images, the target before the references.
    """

    txt_rope: Rope
    img_rope: Rope
    key_bias_BJ: Tensor | None
    dtype: torch.dtype
    ops: Ops
    txt_chunks: Chunks
    target_chunks: Chunks
    reference_chunks: Chunks

    @property
    def num_target(self) -> int:
        return self.target_chunks[-1].stop


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
        last = self.config.num_layers - 1

        def call(i: int, block: Block, streams: list[Streams]) -> list[Streams]:
            modulation = lent.of(i, lambda: block.modulation(time.to(run.dtype)))
            return [
                run.visit(block, *stream, modulation, joint, i == last)
                for stream, joint in zip(streams, joints, strict=True)
            ]

        streams = [self._streams(x_BCTHW, steered) for steered in passes]
        streams = run_blocks(self.transformer_blocks, streams, call, run=run)
        modulation = lent.of("out", lambda: self.norm_out(time[: len(timestep_B)]))
        outs = [
            self._head(img, modulation, joint.target_chunks) for (img, _), joint in zip(streams, joints, strict=True)
        ]
        (h, w), t, p = _grid(x_BCTHW), x_BCTHW.shape[2], PATCH
        return [rearrange(out, "b (t h w) (c p q) -> b c t (h p) (w q)", t=t, h=h, w=w, p=p, q=p) for out in outs]

    def _streams(self, x_BCTHW: Tensor, steered: Pass) -> Streams:
        """Return images and text as the first block takes them, which may change them.

        In float32: they grow beyond float16, and bfloat16 would round each small addition away.
        """
        batch, rows = x_BCTHW.shape[0], steered.prompt.rows_BSE
        tokens = [_tokens(image).expand(batch, -1, -1) for image in (x_BCTHW, *steered.references)]
        return self.img_in(torch.cat(tokens, dim=1).float()), rows.repeat(batch // len(rows), 1, 1)

    def _head(self, img_BLE: Tensor, modulation: tuple[Tensor, Tensor], chunks: Chunks) -> Tensor:
        scale, shift = modulation
        parts = [self.proj_out(modulate(img_BLE[:, rows], shift, scale, self.config.eps)) for rows in chunks]
        return torch.cat(parts, dim=1)

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
        num_target = frames * grids[0][0] * grids[0][1]
        return Joint(
            txt_rope=txt_rope,
            img_rope=img_rope,
            key_bias_BJ=bias,
            dtype=run.dtype,
            ops=run.ops,
            txt_chunks=row_chunks(rows.shape[1], run.chunk_rows),
            target_chunks=row_chunks(num_target, run.chunk_rows),
            reference_chunks=row_chunks(len(img_rope[0]) - num_target, run.chunk_rows, num_target),
        )


class TimeEmbedding(nn.Module):
    """Embed the timestep; for a model with `zero_cond_t` one more row, last, embeds time 0. All in float32."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.freq_dim, self.zero_cond_t = config.freq_dim, config.zero_cond_t
        self.timestep_embedder = TimeMLP(config.freq_dim, config.dim)
        # Row 0 is added for every picture that people make; what row 1 was trained for is not published.
        self.addition_t_embedding = _blank_embedding(2, config.dim) if config.layered else None

    def forward(self, timestep_B: Tensor, device: torch.device) -> Tensor:
        if self.zero_cond_t:
            timestep_B = F.pad(timestep_B, (0, 1))
        time_BE = self.timestep_embedder(sent(timestep_embedding(timestep_B, self.freq_dim), device))
        return time_BE if self.addition_t_embedding is None else time_BE + self.addition_t_embedding.weight[0].float()


def _blank_embedding(rows: int, width: int) -> nn.Embedding:
    # Random numbers, which weights replace anyway, would take seconds on the meta device: PyTorch then imports much.
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


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
    """Joint attention over text and images, then a feed-forward of each; every branch is modulated and gated.

    Without gradients the streams given to it are changed.
    """

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
        self, img: Tensor, txt: Tensor, modulation: tuple[Tensor, Tensor], joint: Joint, is_last: bool
    ) -> Streams:
        """Return both streams. Of the last block only the target's rows are read afterwards.

        There the references and the text serve as keys and values alone; the text returns as it came.
        """
        img_mod, txt_mod = modulation
        # Where the model treats references as clean pictures, they follow the row of time 0.
        target_mod, reference_mod = (img_mod[:-1], img_mod[-1:]) if self.zero_cond_t else (img_mod, img_mod)
        targets = tuple((rows, target_mod) for rows in joint.target_chunks)
        references = tuple((rows, reference_mod) for rows in joint.reference_chunks)
        texts = tuple((rows, txt_mod) for rows in joint.txt_chunks)
        gathered = self.attn(
            self._normed(img, (*targets, *references), joint), self._normed(txt, texts, joint), joint, len(img), is_last
        )
        if is_last:
            target = img[:, : joint.num_target]
            return self._finish(target, targets, gathered, self.attn.to_out[0], self.img_mlp, joint.ops), txt
        of_txt, of_img = gathered.tensor_split((txt.shape[1],), dim=1)
        img = self._finish(img, (*targets, *references), of_img, self.attn.to_out[0], self.img_mlp, joint.ops)
        return img, self._finish(txt, texts, of_txt, self.attn.to_add_out, self.txt_mlp, joint.ops)

    def _normed(self, x: Tensor, parts: Parts, joint: Joint) -> NormedRows:
        """Give each part of a stream as the attention takes it."""
        for rows, mod in parts:
            constants = modulated_by(mod[:, 0:1], mod[:, 1:2], self.eps)
            yield rows, joint.ops.layer_norm(x[:, rows], constants, joint.dtype)

    def _finish(self, x: Tensor, parts: Parts, gathered: Tensor, out: Linear, mlp: "FeedForward", ops: Ops) -> Tensor:
        """Add to each part of a stream what it gathered, projected by `out`, and then its feed-forward."""
        dtype, num_rows = gathered.dtype, gathered.shape[0] * gathered.shape[1]
        project, feed = (layer.at(dtype, num_rows, ops.products) for layer in (out, mlp))
        for rows, mod in parts:
            _, _, gate_sa, shift, scale, gate_ff = mod.split(1, dim=1)
            modulated = modulated_by(shift, scale, self.eps)
            x, normed = ops.add_norm(x, rows, project(gathered[:, rows]), gate_sa, modulated, dtype)
            x = ops.add_to_rows(x, rows, feed(normed), gate_ff)
        return x


class JointAttention(nn.Module):
    """Full attention over text and images, text first, each with its own projections; q and k have a norm per head."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        dim, self.heads = config.dim, config.num_heads
        self.width = dim // config.num_heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.to_add_out = Linear(dim, dim)
        norms = (RMSNorm(self.width, config.eps) for _ in range(4))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norms

    def forward(self, img: NormedRows, txt: NormedRows, joint: Joint, batch: int, is_last: bool) -> Tensor:
        """Return what all rows gather [B, J, E], not yet projected; with `is_last` what the target's rows do."""
        num_text, num_images = len(joint.txt_rope[0]), len(joint.img_rope[0])
        shape, device = (batch, num_text + num_images, self.heads, self.width), joint.img_rope[0].device
        q, k, v = qkv = tuple(torch.empty(shape, dtype=joint.dtype, device=device) for _ in range(3))
        layers = self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k
        fill = partial(self._fill, ops=joint.ops)
        fill([t[:, :num_text] for t in qkv], txt, joint.txt_rope, layers, 0 if is_last else num_text)
        layers = self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k
        num_asking = joint.num_target if is_last else num_images
        fill([t[:, num_text:] for t in qkv], img, joint.img_rope, layers, num_asking)
        if is_last:
            q = q[:, num_text : num_text + num_asking]
        del qkv
        return attention_in_place(q, k, v, joint.key_bias_BJ, joint.ops.attention).flatten(2)

    def _fill(
        self,
        qkv: list[Tensor],
        normed: NormedRows,
        rope: Rope,
        layers: tuple[nn.Module, ...],
        num_asking: int,
        ops: Ops,
    ) -> None:
        """Write the queries of the first `num_asking` rows of a stream, and the keys and values of all."""
        (q, k, v), (cos, sin) = qkv, rope
        to_q, to_k, to_v = (layer.at(q.dtype, k.shape[0] * k.shape[1], ops.products) for layer in layers[:3])
        norm_q, norm_k = layers[3:]
        for rows, x in normed:
            part, x = (cos[rows], sin[rows]), round_once(x, to_q, to_k, to_v)
            if rows.stop <= num_asking:
                ops.norm_rotate(to_q(x), norm_q.constants, part, q[:, rows])
            ops.norm_rotate(to_k(x), norm_k.constants, part, k[:, rows])
            v[:, rows] = rearrange(to_v(x), "b l (n d) -> b l n d", n=self.heads)


class FeedForward(nn.Module):
    """Two layers with a GELU (tanh form) between them, named as in the official checkpoints."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": Linear(dim, ffn_dim)}), "2": Linear(ffn_dim, dim)})

    def at(self, dtype: torch.dtype, num_rows: int, products: Sequence[Product]) -> Callable[[Tensor], Tensor]:
        """Return the layers as a function of tensors of this dtype, of which all calls bring so many rows."""
        return feed_forward(self.net["0"]["proj"], self.net["2"], dtype, num_rows, products)


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
