"""The Qwen-Image transformer against diffusers' on models drawn anew in every run, and its other promises."""
# B batch, C channels, T images, H W latent positions

import math
import random
import secrets

import pytest
import torch
from torch import Tensor
from wanqwen.core.blocks import Run
from wanqwen.qwen_image.config import QwenImageConfig
from wanqwen.qwen_image.transformer import Block, Modulations, QwenImageTransformer
from wanqwen.tests.manifests import manifest, on_meta

SIZES = {"num_layers": 2, "num_heads": 3, "dim": 36, "ffn_dim": 80, "text_dim": 20, "freq_dim": 32, "axes": (2, 4, 6)}
KINDS = ("t2i", "edit", "zero_cond_t", "layered", "masked")
UNREAD = (  # parameters of the last block that only its text output would need
    "attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight", "attn.to_add_out.weight",
    "attn.to_add_out.bias", "txt_mlp.net.0.proj.weight", "txt_mlp.net.0.proj.bias", "txt_mlp.net.2.weight",
    "txt_mlp.net.2.bias",
)  # fmt: skip


def build(config: QwenImageConfig, generator: torch.Generator) -> QwenImageTransformer:
    """Return a model whose activations stay near 1."""
    model = QwenImageTransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        spread = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or "attn.norm" in name:
            parameter += 1
        if "linear_1.weight" in name:  # diffusers forms the angles of the time in float32, off by up to 1e-4
            parameter *= 0.3
    return model


@pytest.fixture(scope="module")
def model() -> QwenImageTransformer:
    return build(QwenImageConfig(**SIZES), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def edit_model() -> QwenImageTransformer:
    return build(QwenImageConfig(**SIZES, zero_cond_t=True), torch.Generator().manual_seed(0))


def inputs(batch: int = 1, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, 1, 6, 10, generator=generator)
    times = torch.tensor([612.0, 87.5])[:batch]
    return x, times, torch.randn(batch, rows, SIZES["text_dim"], generator=generator)


def reference(height: int, width: int, seed: int = 2) -> Tensor:
    return torch.randn(1, 16, 1, height, width, generator=torch.Generator().manual_seed(seed))


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()


# Comparison with diffusers


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_equals_that_of_diffusers_on_a_random_model(kind: str) -> None:
    import diffusers

    seed = secrets.randbits(32)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config = draw_config(draw, kind)
    ours = build(config, generator)
    theirs = twin(diffusers, ours)
    batch = 2 if kind == "masked" else draw.randint(1, 2)
    frames = draw.randint(1, 4) if kind == "layered" else 1
    num_references = {"t2i": 0, "masked": draw.randint(0, 1), "layered": 1}.get(kind, draw.randint(1, 3))
    sizes = [(2 * draw.randint(1, 6), 2 * draw.randint(1, 6)) for _ in range(1 + num_references)]
    x = torch.randn(batch, 16, frames, *sizes[0], generator=generator)
    references = [torch.randn(batch, 16, 1, *size, generator=generator) for size in sizes[1:]]
    text = torch.randn(batch, draw.randint(1, 12), config.text_dim, generator=generator)
    valid = (torch.rand(text.shape[:2], generator=generator) < 0.6) if kind == "masked" else None
    sigma = torch.rand(batch, generator=generator)
    run = Run()
    out = ours(x, sigma * 1000, ours.prompt(text, run, valid), run, references)
    targets = list(x.split(1, dim=2))
    with torch.no_grad():
        expected = theirs(
            hidden_states=torch.cat([packed(image) for image in (*targets, *references)], dim=1),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=valid,
            timestep=sigma,
            img_shapes=[[(1, h // 2, w // 2) for h, w in [sizes[0]] * frames + sizes[1:]]] * batch,
            additional_t_cond=torch.zeros(batch, dtype=torch.long) if config.layered else None,
            return_dict=False,
        )[0]
    rows = torch.cat([packed(image) for image in out.split(1, dim=2)], dim=1)
    assert out.dtype == torch.float32 and out.shape == x.shape
    difference = error(rows, expected[:, : rows.shape[1]])
    assert difference <= 2e-5, f"seed {seed}: {difference:.2e} with {config}, sizes {sizes}, {frames} images"


def draw_config(draw: random.Random, kind: str) -> QwenImageConfig:
    heads, axes = draw.randint(1, 4), tuple(2 * draw.randint(1, 4) for _ in range(3))
    dim = heads * sum(axes)
    return QwenImageConfig(
        num_layers=draw.randint(1, 3),
        num_heads=heads,
        dim=dim,
        ffn_dim=4 * dim,  # diffusers' class knows no other
        text_dim=draw.randint(8, 48),
        axes=axes,
        zero_cond_t=kind == "zero_cond_t",
        layered=kind == "layered",
    )


def twin(diffusers, ours: QwenImageTransformer) -> torch.nn.Module:
    config = ours.config
    theirs = diffusers.QwenImageTransformer2DModel(
        num_layers=config.num_layers, num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads, joint_attention_dim=config.text_dim,
        axes_dims_rope=config.axes, zero_cond_t=config.zero_cond_t, use_additional_t_cond=config.layered,
        use_layer3d_rope=config.layered,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def packed(image_BC1HW: Tensor) -> Tensor:
    """Return the tokens of one image as the published pipelines order them."""
    batch, channels, _, height, width = image_BC1HW.shape
    out = torch.empty(batch, height * width // 4, channels * 4)
    for y in range(height // 2):
        for x in range(width // 2):
            for dy in range(2):
                for dx in range(2):
                    pixel = image_BC1HW[:, :, 0, 2 * y + dy, 2 * x + dx]
                    out[:, y * (width // 2) + x, dy * 2 + dx :: 4] = pixel
    return out


# Names


@pytest.mark.parametrize("name", ["qwen_diffusers_transformer", "qwen_comfy_bf16"])
def test_state_dict_equals_the_manifest(name: str) -> None:
    found = {key: tuple(shape) for key, (_, shape) in manifest(name)["tensors"].items()}
    found = {key.removeprefix("model.diffusion_model."): shape for key, shape in found.items()}
    assert on_meta(lambda: QwenImageTransformer(QwenImageConfig())) == found


# Work that is shared or saved


def test_modulation_of_a_step_is_made_once_and_bit_identical(
    edit_model: QwenImageTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = Block.modulation
    monkeypatch.setattr(Block, "modulation", lambda self, time: made.append(self) or original(self, time))
    x, timestep, text = inputs()
    run, lent, references = Run(), edit_model.modulations(), [reference(4, 6)]
    prompts = [edit_model.prompt(rows, run) for rows in (text, text.flip(1))]
    # With references and without, at two timesteps: they share what the timestep makes, and only that.
    for time in (timestep, timestep / 2, timestep):
        inline = [edit_model(x, time, p, run, images) for p, images in zip(prompts, (references, ()), strict=True)]
        made.clear()
        shared = [
            edit_model(x, time, p, run, images, lent) for p, images in zip(prompts, (references, ()), strict=True)
        ]
        assert len(made) == SIZES["num_layers"]
        assert all(torch.equal(a, b) for a, b in zip(inline, shared, strict=True))


def test_modulations_hold_the_last_timestep_only() -> None:
    lent = Modulations()
    lent.turn_to(torch.tensor([1.0]))
    assert lent.of("a", lambda: 1) == 1 and lent.of("a", lambda: 2) == 1
    lent.turn_to(torch.tensor([1.0]))
    assert lent.of("a", lambda: 3) == 1
    lent.turn_to(torch.tensor([2.0]))
    assert lent.of("a", lambda: 4) == 4


def test_text_work_of_the_last_block_is_not_done(model: QwenImageTransformer) -> None:
    x, timestep, text = inputs()
    expected = model(x, timestep, model.prompt(text, Run()), Run(), [reference(4, 4)])
    broken = QwenImageTransformer(model.config).requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in UNREAD:
        weights[f"transformer_blocks.1.{name}"].fill_(float("nan"))
    broken.load_state_dict(weights)
    assert torch.equal(broken(x, timestep, broken.prompt(text, Run()), Run(), [reference(4, 4)]), expected)


def test_every_other_parameter_learns(edit_model: QwenImageTransformer) -> None:
    x, timestep, text = inputs()
    learner = QwenImageTransformer(edit_model.config)
    learner.load_state_dict(edit_model.state_dict())
    learner(x, timestep, learner.prompt(text, Run()), Run(), [reference(4, 4)]).square().mean().backward()
    still = {name for name, p in learner.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert still == {f"transformer_blocks.1.{name}" for name in UNREAD}


# Prompts and batches


def test_padding_is_not_attended(model: QwenImageTransformer) -> None:
    x, timestep, text = inputs()
    valid = torch.tensor([[True] * 5 + [False] * 2])
    out = model(x, timestep, model.prompt(text, Run(), valid), Run())
    other = torch.cat((text[:, :5], text[:, 5:].flip(1) * 3), dim=1)
    assert error(model(x, timestep, model.prompt(other, Run(), valid), Run()), out) < 1e-6
    assert error(model(x, timestep, model.prompt(text, Run()), Run()), out) > 1e-3
    assert error(model(x, timestep, model.prompt(text[:, :5], Run()), Run()), out) < 2e-5


def test_without_padding_there_is_no_mask(model: QwenImageTransformer) -> None:
    _, _, text = inputs()
    assert model.prompt(text, Run()).key_bias_BS is None
    assert model.prompt(text, Run(), torch.ones(1, 7, dtype=torch.bool)).key_bias_BS is None


def test_one_prompt_and_one_reference_serve_a_batch(edit_model: QwenImageTransformer) -> None:
    x, timesteps, text = inputs(batch=2)
    prompt, references = edit_model.prompt(text[:1], Run()), [reference(4, 6), reference(2, 2, seed=3)]
    together = edit_model(x, timesteps, prompt, Run(), references)
    for i in range(2):
        alone = edit_model(x[i : i + 1], timesteps[i : i + 1], prompt, Run(), references)
        assert error(together[i : i + 1], alone) < 2e-5


def test_references_and_their_order_matter(model: QwenImageTransformer) -> None:
    x, timestep, text = inputs()
    first, second = reference(4, 6), reference(4, 6, seed=3)
    prompt = model.prompt(text, Run())
    outs = [model(x, timestep, prompt, Run(), images) for images in ((), (first,), (first, second), (second, first))]
    assert all(error(a, b) > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


# Precision, interruption, bad input


def test_bfloat16_stays_near_float32(model: QwenImageTransformer) -> None:
    x, timestep, text = inputs()
    exact = model(x, timestep, model.prompt(text, Run()), Run())
    run = Run(dtype=torch.bfloat16)
    out = model(x, timestep, model.prompt(text, run), run)
    assert out.dtype == torch.float32
    assert 0 < error(out, exact) < 2e-2


def test_a_run_stops_between_blocks(model: QwenImageTransformer) -> None:
    asked = []

    def interrupt() -> None:
        asked.append(None)
        if len(asked) == 2:
            raise InterruptedError

    x, timestep, text = inputs()
    run = Run(check_interrupt=interrupt)
    with pytest.raises(InterruptedError):
        model(x, timestep, model.prompt(text, run), run)
    assert len(asked) == 2


def test_weights_of_a_block_are_used_in_its_turn_only(model: QwenImageTransformer) -> None:
    """A hook that lends a block its weights must see no use of them outside before() and after()."""
    swapped = QwenImageTransformer(model.config).requires_grad_(False)
    swapped.load_state_dict(model.state_dict())
    home = [{n: p.data for n, p in block.named_parameters()} for block in swapped.transformer_blocks]

    class Lend:
        def before(self, i: int) -> None:
            for name, parameter in swapped.transformer_blocks[i].named_parameters():
                parameter.data = home[i][name]

        def after(self, i: int) -> None:
            for parameter in swapped.transformer_blocks[i].parameters():
                parameter.data = torch.empty(0)

    for i in range(SIZES["num_layers"]):
        Lend().after(i)
    x, timestep, text = inputs()
    run, lent = Run(hooks=(Lend(),)), swapped.modulations()
    expected = model(x, timestep, model.prompt(text, Run()), Run())
    for _ in range(2):
        assert torch.equal(swapped(x, timestep, swapped.prompt(text, run), run, (), lent), expected)


@pytest.mark.parametrize(("height", "width"), [(5, 8), (8, 3), (0, 4)])
def test_latents_that_do_not_divide_into_patches_are_refused(
    model: QwenImageTransformer, height: int, width: int
) -> None:
    x, timestep, text = inputs()
    prompt = model.prompt(text, Run())
    with pytest.raises(ValueError, match=f"patches of 2 x 2, got {width} x {height} positions"):
        model(torch.zeros(1, 16, 1, height, width), timestep, prompt, Run())
    with pytest.raises(ValueError, match=f"got {width} x {height} positions"):
        model(x, timestep, prompt, Run(), [reference(4, 4), torch.zeros(1, 16, 1, height, width)])


def test_a_reference_of_extreme_size_is_taken(model: QwenImageTransformer) -> None:
    x, timestep, text = inputs()
    out = model(x, timestep, model.prompt(text, Run()), Run(), [reference(2, 512)])
    assert out.shape == x.shape and out.isfinite().all()


# Memory


@pytest.mark.parametrize("num_references", [0, 2])
def test_work_in_place_changes_neither_results_nor_what_was_given(
    model: QwenImageTransformer, edit_model: QwenImageTransformer, num_references: int
) -> None:
    x, timestep, text = inputs(batch=2)
    references = [reference(4, 6), reference(2, 2, seed=3)][:num_references]
    for network in (model, edit_model):
        prompt = network.prompt(text[:1], Run())
        given = [t.clone() for t in (x, prompt.rows_BSE, *references)]
        kept = network(x, timestep, prompt, Run(), references)
        with torch.inference_mode():
            assert torch.equal(network(x, timestep, prompt, Run(), references), kept)
        assert all(torch.equal(a, b) for a, b in zip(given, (x, prompt.rows_BSE, *references), strict=True))


@pytest.mark.parametrize("chunk_rows", [1, 4, 14])
def test_chunks_change_nothing_but_rounding(
    model: QwenImageTransformer, edit_model: QwenImageTransformer, chunk_rows: int
) -> None:
    x, timestep, text = inputs(batch=2)
    valid = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    for network in (model, edit_model):
        for references in ((), (reference(4, 6), reference(2, 2, seed=3))):
            with torch.inference_mode():
                prompt = network.prompt(text, Run(), valid)
                whole = network(x, timestep, prompt, Run(), references)
                chunked = network(x, timestep, prompt, Run(chunk_rows=chunk_rows), references)
            assert error(chunked, whole) < 2e-6
