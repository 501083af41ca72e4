"""Read what a LoRA file changes, whoever wrote it, and hold that against a model: from its header alone.

A file's names are module paths in one of a family's spellings, before them a prefix, behind them what the tensor is.
Tools of kohya's line write the path with underscores for dots; which dot was which is looked up, never guessed.
"""
# O rows of a weight (its outputs), I its inputs, R rank

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

from ..storage import TORCH_NAMES
from ..types import Checkpoint, Spelling
from .identity import read_json
from .keymap import Renamer, inverse

Shape = tuple[int, ...]

WEIGHT, BIAS = "weight", "bias"
MODULATION, MODULATION_ENDING = ".modulation", ".diff_m"  # the difference of a bare parameter
# How names end -> which parameter of its module the tensor is for, and its role there.
ENDINGS = {
    ".lora_A.weight": (WEIGHT, "down"),
    ".lora_B.weight": (WEIGHT, "up"),
    ".lora_down.weight": (WEIGHT, "down"),
    ".lora_up.weight": (WEIGHT, "up"),
    ".lora.down.weight": (WEIGHT, "down"),
    ".lora.up.weight": (WEIGHT, "up"),
    ".lora_linear_layer.down.weight": (WEIGHT, "down"),
    ".lora_linear_layer.up.weight": (WEIGHT, "up"),
    ".lora_A": (WEIGHT, "down"),
    ".lora_B": (WEIGHT, "up"),
    ".alpha": (WEIGHT, "alpha"),
    ".dora_scale": (WEIGHT, "magnitude"),
    ".lora_magnitude_vector.weight": (WEIGHT, "magnitude"),
    ".lora_magnitude_vector": (WEIGHT, "magnitude"),
    ".diff": (WEIGHT, "diff"),
    ".w_norm": (WEIGHT, "diff"),
    ".diff_b": (BIAS, "diff"),
    ".b_norm": (BIAS, "diff"),
    **{f".hada_{part}": (WEIGHT, part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": (WEIGHT, f"k{part}") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    # Known, and nothing that is done here: factors of convolutions, biases of factors, replaced and resized weights.
    **{f".{kind}": (WEIGHT, kind) for kind in ("lora_mid.weight", "set_weight", "reshape_weight", "lora_B.bias")},
}
ADAPTER_NAME = re.compile(
    r"(\.lora_(?:A|B|magnitude_vector))\.(?!weight$|bias$)\w+(?=\.weight$|$)"
)  # PEFT's, as `.default`
UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
PREFIXES = (
    "base_model.model.diffusion_model.", "base_model.model.transformer.", "model.diffusion_model.", "base_model.model.",
    "diffusion_model.", "transformer.", "pipe.dit.", "model.", "",
)  # fmt: skip
MOST_LAYERS = 256  # of any stack, in names with underscores

LOW_RANK = frozenset(("down", "up"))
HADAMARD = frozenset(("w1_a", "w1_b", "w2_a", "w2_b"))
BESIDE = frozenset(("alpha", "magnitude"))
PEFT_METADATA = "lora_adapter_metadata"  # of a safetensors header: what PEFT has in adapter_config.json
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """What a file changes. `parts` maps (module path, parameter), in official names, to its tensors by role.

    `unknown` are names of the file that are none of a family's, `twice` those that say again what others say.
    """

    checkpoint: Checkpoint
    dialect: str
    parts: Mapping[tuple[str, str], Mapping[str, str]]
    unknown: tuple[str, ...]
    twice: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """The different ranks of its factors, in order."""
        roles = ("down", "w1_b", "kw1_b", "kw2_b")
        names = (tensors[role] for tensors in self.parts.values() for role in roles if role in tensors)
        return sorted({shape[0] for name in names if (shape := self.checkpoint.tensors[name].shape)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A LoRA held against a model: what of it changes which parameter, and which names are not used, by reason."""

    parts: Mapping[str, Mapping[str, str]]
    unused: Mapping[str, tuple[str, ...]]

    @property
    def num_used(self) -> int:
        """How many of the file's tensors are used."""
        return sum(len(tensors) for tensors in self.parts.values())


def is_lora(checkpoint: Checkpoint) -> bool:
    """Say whether a file changes a model instead of being one."""
    return any(_ending(name) is not None for name in checkpoint.tensors)


def read_names(checkpoint: Checkpoint, spellings: Iterable[Spelling]) -> LoraFile:
    """Return what a file changes, in official names. Nothing but the header is read."""
    lookup = _lookup(tuple(spellings))
    parts: dict[tuple[str, str], dict[str, str]] = {}
    unknown: list[str] = []
    twice: list[str] = []
    spelled: Counter[str] = Counter()
    endings: set[str] = set()
    for name in checkpoint.tensors:
        ending = _ending(name)
        found = None if ending is None else lookup(ending[0])
        if found is None:
            unknown.append(name)
            continue
        official, spelling = found
        _, leaf, role, suffix = ending
        tensors = parts.setdefault((official, leaf), {})
        if role in tensors:
            twice.append(name)
            continue
        tensors[role] = name
        spelled[spelling] += 1
        endings.add(suffix)
    kinds = (suffix.strip(".").removesuffix(".weight") for suffix in (*ENDINGS, MODULATION_ENDING) if suffix in endings)
    dialect = f"{' and '.join(name for name, _ in spelled.most_common())}: {', '.join(kinds)}"
    return LoraFile(checkpoint=checkpoint, dialect=dialect, parts=parts, unknown=tuple(unknown), twice=tuple(twice))


def fit(file: LoraFile, parameters: Mapping[str, Shape], parts: Mapping[str, str]) -> Fit:
    """Hold a LoRA against a model's parameters, by name and shape; `parts` are a family's, see `types.Family`."""
    used: dict[str, Mapping[str, str]] = {}
    unused: dict[str, list[str]] = {}
    for (path, leaf), tensors in file.parts.items():
        bare = leaf == WEIGHT and path in parameters
        name = path if bare else f"{path}.{leaf}"
        reason = _missing(path, name, parameters, parts) or _misfit(file.checkpoint, tensors, parameters[name])
        if reason is None:
            used[name] = tensors
        else:
            unused.setdefault(reason, []).extend(tensors.values())
    if file.unknown:
        unused["no model of this family has such names"] = list(file.unknown)
    if file.twice:
        unused["the file has this twice, in two ways to name it; the first one counts"] = list(file.twice)
    return Fit(parts=used, unused={reason: tuple(names) for reason, names in unused.items()})


def scale_of(checkpoint: Checkpoint, rank: int, alpha: float | None, name: str) -> float:
    """Return what a difference of this rank is multiplied by: alpha / rank, or 1 where no alpha is stated anywhere.

    `alpha` is what a tensor says. Without one PEFT's config counts, if there is one; `name` is the factor's.
    """
    if alpha is not None:
        return alpha / rank
    config, (module, *_) = _peft_config(checkpoint), _ending(name) or (name,)
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        found = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = config.get("lora_alpha") if found is None else found
        stated = None if alpha is None else float(alpha)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"{checkpoint.path}: what {PEFT_CONFIG} or the metadata {PEFT_METADATA} says of alpha can't be read "
            f"({error}): download it again"
        ) from error
    return 1.0 if stated is None else stated / (sqrt(rank) if config.get("use_rslora") else rank)


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.path.name == PEFT_FILE:
        return read_json(checkpoint.path.parent / PEFT_CONFIG)
    try:
        config = json.loads(checkpoint.metadata.get(PEFT_METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{checkpoint.path}: metadata {PEFT_METADATA} is not JSON: download it again") from error
    if not isinstance(config, dict):
        return {}
    # The keys of a pipeline have the name of the model in front.
    return {key.rpartition(".")[2]: value for key, value in config.items() if not key.startswith("text_encoder")}


def _ending(name: str) -> tuple[str, str, str, str] | None:
    """Return what comes before a known ending, the parameter and role that it stands for, and the ending."""
    name = ADAPTER_NAME.sub(r"\1", name)
    if name.endswith(MODULATION_ENDING):
        return name.removesuffix(MODULATION_ENDING) + MODULATION, WEIGHT, "diff", MODULATION_ENDING
    for ending, (leaf, role) in ENDINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), leaf, role, ending
    return None


def _lookup(spellings: tuple[Spelling, ...]) -> Callable[[str], tuple[str, str] | None]:
    """Return a function from a module as a file names it to its official path, and how the file writes it."""
    renamers = [(spelling.name, Renamer(inverse(spelling.table))) for spelling in spellings]
    flat: dict[str, tuple[str, str]] = {}
    for spelling in reversed(spellings):  # the first one wins
        for official, other in spelling.table.items():
            for i in range(MOST_LAYERS if "{}" in official else 1):
                flat[other.format(i).replace(".", "_")] = (official.format(i), spelling.name)

    def find(module: str) -> tuple[str, str] | None:
        for prefix in UNDERSCORED:
            if module.startswith(prefix) and (found := flat.get(module.removeprefix(prefix))):
                return found[0], f"{found[1]} names with underscores, prefix {prefix}"
        for prefix in PREFIXES:
            if module.startswith(prefix):
                for name, rename in renamers:
                    if official := rename(module.removeprefix(prefix)):
                        return official, f"{name} names" + (f", prefix {prefix}" if prefix else "")
        return None

    return find


def _missing(path: str, name: str, parameters: Mapping[str, Shape], parts: Mapping[str, str]) -> str | None:
    """Return why a model has no such parameter, None if it has."""
    if name in parameters:
        return None
    for piece, what in parts.items():
        if piece in path and not any(piece in known for known in parameters):
            return f"this model has no {what}"
    stack, _, rest = path.partition(".")
    layer, _, inner = rest.partition(".")
    if layer.isdecimal() and any(known.startswith(f"{stack}.0.{inner}") for known in parameters):
        count = len({known.split(".")[1] for known in parameters if known.startswith(f"{stack}.")})
        return f"this model has {count} {stack}"
    return "this model has no such parameter"


def _misfit(checkpoint: Checkpoint, tensors: Mapping[str, str], wanted: Shape) -> str | None:
    """Return why tensors can't change a parameter of a shape, None if they can."""
    shapes = {role: checkpoint.tensors[name].shape for role, name in tensors.items()}
    for name in tensors.values():
        if checkpoint.tensors[name].dtype not in TORCH_NAMES:
            return f"stored as {checkpoint.tensors[name].dtype}, which can't be read"
    roles = shapes.keys() - BESIDE
    rows, width = wanted[0], prod(wanted[1:])
    if "diff" in roles and len(roles) == 1:
        found = shapes["diff"]
        fits = (*found[:1], prod(found)) == (*wanted[:1], prod(wanted))
        fits = fits and [n for n in found if n > 1] == [n for n in wanted if n > 1]
    elif roles in (LOW_RANK, HADAMARD):
        pairs = [("up", "down")] if roles == LOW_RANK else [("w1_a", "w1_b"), ("w2_a", "w2_b")]
        products = [_product(shapes[up], shapes[down]) for up, down in pairs]
        found, fits = products[0], all(product == (rows, width) for product in products)
    elif (outer := _matrix(shapes, "kw1")) and (inner := _matrix(shapes, "kw2")) and not roles - _KRONECKER:
        found = outer[0] * inner[0], outer[1] * inner[1]
        fits = found == (rows, width)
    else:
        return f"a change of a kind that is not known ({', '.join(sorted(roles)) or 'no factors'})"
    if prod(shapes.get("alpha", ())) != 1:
        return f"alpha is not one number but {_by(shapes['alpha'])}"
    magnitude = shapes.get("magnitude", wanted[:1])
    if (magnitude[:1], prod(magnitude)) not in ((wanted[:1], rows), ((1,), width)):
        return f"magnitudes of another size: {_by(magnitude)} where this model has {_by(wanted)}"
    if not found:
        return "factors that don't belong together"
    return None if fits else f"another size: {_by(found)} where this model has {_by(wanted)}"


_KRONECKER = {f"kw{i}{part}" for i in (1, 2) for part in ("", "_a", "_b")}


def _matrix(shapes: Mapping[str, Shape], role: str) -> Shape:
    """Return the shape of a matrix that is there whole or as two factors; nothing if it is not there."""
    if role in shapes:
        return shapes[role] if len(shapes[role]) == 2 else ()
    up, down = f"{role}_a", f"{role}_b"
    return _product(shapes[up], shapes[down]) if up in shapes and down in shapes else ()


def _product(up: Shape, down: Shape) -> Shape:
    """Return [O, I] of `up @ down`, whose axes after the second are those of a kernel; nothing if they don't match."""
    is_product = len(up) >= 2 and len(down) >= 2 and prod(up[1:]) == down[0] > 0
    return (up[0], prod(down[1:])) if is_product else ()


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"
