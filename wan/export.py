"""How models of the Wan family are written: in which spellings, and which of their weights published files round."""

from ..core.types import Checkpoint, Identity, Spelling
from ..core.weights import keymap
from ..core.weights.export import WHOLE, Export, Piece, Shapes, renamed, stated_shapes
from ..core.weights.keymap import Share
from .family import keep_float32
from .files import FILES
from .image_encoder import SHARES
from .keymap import (
    DIFFUSION_MODEL_SPELLINGS,
    IMAGE_ENCODER,
    IMAGE_ENCODER_APART,
    IMAGE_ENCODER_FUSED,
    IMAGE_ENCODER_PREFIXES,
    IMAGE_ENCODER_SPELLINGS,
    TEXT_ENCODER_SPELLINGS,
    vae_spellings,
)
from .shapes import vae as vae_shapes

OFFICIAL, DIFFUSERS, COMFYUI, KIJAI, HUGGINGFACE = "official", "diffusers", "comfyui", "kijai", "huggingface"
TOKENIZER = "spiece_model"  # the bytes of Wan's tokenizer in ComfyUI's text encoder files
ARCHITECTURE, TEXT_ARCHITECTURE = "wan", "t5encoder"  # as GGUF files call them


def export_of(checkpoint: Checkpoint, identity: Identity) -> Export:
    """Return how a checkpoint of this family can be written."""
    return EXPORTS[identity.role](checkpoint, identity)


def _diffusion_model(checkpoint: Checkpoint, identity: Identity) -> Export:
    official, diffusers = DIFFUSION_MODEL_SPELLINGS
    shapes = FILES.parameters(identity.config)
    return Export(
        shapes=shapes,
        spellings={OFFICIAL: official, DIFFUSERS: diffusers, COMFYUI: official, KIJAI: official},
        respell=renamed(identity, shapes),
        quantised=("blocks.*.weight", "vace_blocks.*.weight"),  # as Kijai's scaled files
        linears=("*.weight",),  # as Comfy-Org's
        float32=keep_float32,
        carried=("model_type.*",),
        gguf=ARCHITECTURE,
        gguf_spelling=official,
    )


def _vae(checkpoint: Checkpoint, identity: Identity) -> Export:
    official, diffusers = vae_spellings(identity.config.num_res_blocks)
    shapes = vae_shapes(identity.config)
    spellings = {OFFICIAL: official, DIFFUSERS: diffusers, COMFYUI: official, KIJAI: official}
    return Export(shapes=shapes, spellings=spellings, respell=renamed(identity, shapes))


def _text_encoder(checkpoint: Checkpoint, identity: Identity) -> Export:
    official, huggingface, _, llama_cpp = TEXT_ENCODER_SPELLINGS
    shapes = stated_shapes(checkpoint, identity)
    others = dict.fromkeys((HUGGINGFACE, DIFFUSERS, COMFYUI), huggingface)
    return Export(
        shapes=shapes,
        spellings={OFFICIAL: official, KIJAI: official, **others},
        respell=renamed(identity, shapes),
        quantised=("blocks.*.weight",),
        whole=("*.pos_embedding.*",),
        carried=(TOKENIZER,),
        gguf=TEXT_ARCHITECTURE,
        gguf_spelling=llama_cpp,
    )


def _image_encoder(checkpoint: Checkpoint, identity: Identity) -> Export:
    official, huggingface = IMAGE_ENCODER_SPELLINGS
    huggingface = Spelling(name=huggingface.name, table=huggingface.table, prefix=IMAGE_ENCODER_PREFIXES[-1])
    shapes = stated_shapes(checkpoint, identity)
    others = dict.fromkeys((HUGGINGFACE, DIFFUSERS, COMFYUI), huggingface)

    def respell(spelling: Spelling) -> tuple[Piece, ...]:
        if next(iter(shapes)) in _expanded(spelling, identity.config.num_layers):
            return renamed(identity, shapes)(spelling)
        return _apart(shapes) if spelling is huggingface else _fused(shapes)

    heads = {"num_heads": identity.config.num_heads}
    return Export(
        shapes=shapes,
        spellings={OFFICIAL: official, KIJAI: official, **others},
        respell=respell,
        told={} if identity.variant != "custom" else heads,
    )


def _expanded(spelling: Spelling, num_layers: int) -> set[str]:
    paths = {path.format(i) for path in spelling.table for i in range(num_layers)}
    return {path + leaf for path in paths for leaf in (*keymap.LAYER, *keymap.BARE)}


def _apart(shapes: Shapes) -> tuple[Piece, ...]:
    """Return the tensors of an image encoder in official names as transformers has them: q, k and v each its own."""
    rename, pieces = keymap.Renamer(IMAGE_ENCODER), []
    apart = [keymap.Renamer({IMAGE_ENCODER_FUSED: path}) for path in IMAGE_ENCODER_APART]
    for official, shape in shapes.items():
        parts = [name for one in apart if (name := one(official)) is not None]
        rows = (shape[0] // len(parts), *shape[1:]) if parts else shape
        for i, name in enumerate(parts):
            pieces.append(Piece(name=name, shape=rows, parts=((official, Share(index=i, count=len(parts))),)))
        if not parts:
            name = rename(official)
            assert name is not None, official
            leading = len(shape) - 2 if name.endswith("position_embedding.weight") else len(shape) - 1
            pieces.append(_whole(name, shape[leading:] if name in SHARES else shape, official))
    return tuple(pieces)


def _fused(shapes: Shapes) -> tuple[Piece, ...]:
    """Return the tensors of an image encoder in transformers' names as the official code has them: q, k, v in one."""
    rename, pieces = keymap.Renamer(keymap.inverse(IMAGE_ENCODER)), []
    together = [keymap.Renamer({path: IMAGE_ENCODER_FUSED}) for path in IMAGE_ENCODER_APART]
    for ours, shape in shapes.items():
        if (name := together[0](ours)) is not None:
            parts = tuple((other, WHOLE) for one in together for other in shapes if one(other) == name)
            pieces.append(Piece(name=name, shape=(shape[0] * len(parts), *shape[1:]), parts=parts))
        elif (name := rename(ours)) is not None:
            pieces.append(_whole(name, (1,) * (3 - len(shape)) + shape if ours in SHARES else shape, ours))
    return tuple(pieces)


def _whole(name: str, shape: tuple[int, ...], official: str) -> Piece:
    return Piece(name=name, shape=shape, parts=((official, WHOLE),))


EXPORTS = {
    "diffusion_model": _diffusion_model,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "image_encoder": _image_encoder,
}
