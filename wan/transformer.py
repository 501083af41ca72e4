"""The Wan 2.1 diffusion transformer. Parameter names are those of the official checkpoints."""
# B batch, C channels, T H W latent grid, t h w token grid, L = t*h*w tokens, S text or image tokens, E width

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core.blocks import Run, run_blocks
from ..core.ops.embed import timestep_embedding
from ..core.ops.linear import Linear
from ..core.ops.norm import LayerNorm, modulate
from ..core.ops.rope import grid_rope
from ..core.ops.rows import row_chunks
from ..core.ops.sent import sent
from ..core.types import Control
from .blocks import Block, CrossAttention, Keys, Rope, Shared
from .config import WanConfig
from .vace import Stream, VaceBlock

# Up to so many tokens the keys and values of a prompt are kept for all steps: 0.4 GB in the 14B. With more tokens
# making them anew is a thousandth of the work.
TOKENS_THAT_KEEP_KEYS = 8192
IMAGE_EPS = 1e-5  # of the norms around the image rows; all others take the config's


class Prompt:
    """One prompt as the blocks see it: its embedded rows, and the keys and values that blocks asked it to keep.

    `image_BSE` are the embedded rows of its picture, `extra_BCTHW` the channels that join the latent's, and
    `controls` guide it from beside, where the model takes them. Made by `WanTransformer.prompt`; serves every step of a
    run, and both guidance passes where all of this is equal.
    """

    def __init__(
        self,
        rows_BSE: Tensor,
        key_bias_BS: Tensor | None = None,
        image_BSE: Tensor | None = None,
        extra_BCTHW: Tensor | None = None,
        controls: Sequence[Control] = (),
    ):
        self.rows_BSE = rows_BSE
        self.key_bias_BS = key_bias_BS
        self.image_BSE = image_BSE
        self.extra_BCTHW = extra_BCTHW
        self.controls = controls
        self._keys_values: dict[int, list[Keys]] = {}

    def keys_values(self, i: int, cross_attn: "CrossAttention", keep: bool) -> list[Keys]:
        """Return what tokens attend to on visit i, text and picture; with `keep` it is computed the first time only."""
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
        if config.vace_dim:
            self.vace_patch_embedding = PatchEmbedding(config.vace_dim, dim, config.patch_size)
        self.vace_blocks = nn.ModuleList(VaceBlock(config, is_first=not j) for j in range(len(config.vace_layers)))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def visits(self) -> list[Block]:
        """Return all blocks in the order of their visits: a VACE block comes right after the one its hints are for.

        So its hints are added at once, while its weights are there, and wait nowhere.
        """
        guides = dict(zip(self.config.vace_layers, self.vace_blocks, strict=True))
        return [block for i, main in enumerate(self.blocks) for block in (main, guides.get(i)) if block is not None]

    def prompt(
        self,
        text_BSE: Tensor,
        run: Run,
        key_bias_BS: Tensor | None = None,
        image_BSC: Tensor | None = None,
        extra_BCTHW: Tensor | None = None,
        controls: Sequence[Control] = (),
    ) -> Prompt:
        """Embed text encoder rows [B, S, text_dim]; fewer than `text_len` rows are filled up with zeros.

        The zero rows are keys like any other: the model was trained to attend them, so they are never masked.
        With `key_bias_BS` the rows are taken as they are, each key's logit raised by its bias: one zero row with bias
        ln(n) stands for n of them. Models of pictures also take `image_BSC`, image encoder rows, and `extra_BCTHW`,
        channels that join the latent's; VACE models `controls`. Raises ValueError for too many text rows.
        """
        config = self.config
        assert (image_BSC is not None) == bool(config.image_dim) and (extra_BCTHW is not None) == bool(config.extra_dim)
        assert config.vace_layers or not controls
        if text_BSE.shape[1] > self.config.text_len:
            raise ValueError(
                f"Wan takes at most {self.config.text_len} text rows, got {text_BSE.shape[1]}: truncate the prompt"
            )
        if key_bias_BS is None:
            text_BSE = F.pad(text_BSE, (0, 0, 0, self.config.text_len - text_BSE.shape[1]))
        image_BSE = None if image_BSC is None else self.img_emb(image_BSC, run.dtype)
        return Prompt(self.text_embedding(text_BSE.to(run.dtype)), key_bias_BS, image_BSE, extra_BCTHW, controls)

    def forward(self, x_BCTHW: Tensor, timestep_B: Tensor, prompt: Prompt, run: Run) -> Tensor:
        """Return the velocity [B, out_dim, T, H, W] in float32 for timesteps in [0, 1000]."""
        return self.velocities(x_BCTHW, timestep_B, [prompt], run)[0]

    def velocities(self, x_BCTHW: Tensor, timestep_B: Tensor, prompts: Sequence[Prompt], run: Run) -> list[Tensor]:
        """Return the velocity with each prompt, as `forward` does; all of them pass a block before the next one."""
        grid = self.patch_embedding.grid(x_BCTHW)
        num_tokens = math.prod(grid)
        time = sent(timestep_embedding(timestep_B, self.config.freq_dim), x_BCTHW.device)
        time_B1E = self.time_embedding(time)[:, None]
        shared = Shared(
            time_B6E=rearrange(self.time_projection(time_B1E), "b 1 (m e) -> b m e", m=6),
            rope=self.rope(grid, x_BCTHW.device),
            chunks=row_chunks(num_tokens, run.chunk_rows),
            ops=run.ops,
        )
        keep = num_tokens <= TOKENS_THAT_KEEP_KEYS

        visits = self.visits()

        def call(i: int, block: Block, streams: list[Stream]) -> list[Stream]:
            return [visit(i, block, stream, prompt) for stream, prompt in zip(streams, prompts, strict=True)]

        def visit(i: int, block: Block, stream: Stream, prompt: Prompt) -> Stream:
            if not isinstance(block, VaceBlock):
                return replace(
                    stream, x=run.visit(block, stream.x, shared, prompt.keys_values(i, block.cross_attn, keep))
                )
            if not prompt.controls:
                return stream
            if block is self.vace_blocks[0]:
                x = prompt.join(x_BCTHW)
                begun = tuple(self._begun(control, x, shared, run.dtype) for control in prompt.controls)
                stream = replace(stream, controls=begun)
            return block.go_on(stream, shared, prompt.keys_values(i, block.cross_attn, keep), run.visit)

        def hints(block: VaceBlock, streams: list[Stream]) -> list[Stream]:
            pairs = zip(streams, prompts, strict=True)
            return [block.add_hints(stream, prompt.controls, shared, run.dtype) for stream, prompt in pairs]

        inject = {i: partial(hints, block) for i, block in enumerate(visits) if isinstance(block, VaceBlock)}
        streams = [Stream(x=self.patch_embedding(prompt.join(x_BCTHW), run.dtype)) for prompt in prompts]
        streams = run_blocks(visits, streams, call, run=run, inject=inject)
        return [self.head(stream.x, time_B1E, grid, shared.chunks) for stream in streams]

    def _begun(self, control: Control, x_BCTHW: Tensor, shared: Shared, dtype: torch.dtype) -> Tensor:
        """Return a control's first tokens. Raises ValueError for a control of another size.

        The clip's tokens are embedded anew, as the blocks have changed them: nothing is kept for this.
        """
        if control.context.shape[2:] != x_BCTHW.shape[2:]:
            raise ValueError(
                f"The latent is {tuple(x_BCTHW.shape[2:])} (frames, height / 8, width / 8), a control was encoded "
                f"for {tuple(control.context.shape[2:])}: encode it for the size that is sampled."
            )
        x_BLE = self.patch_embedding(x_BCTHW, dtype)
        context_BLE = self.vace_patch_embedding(control.context, dtype)
        return self.vace_blocks[0].begin(x_BLE, context_BLE, shared, dtype)

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
