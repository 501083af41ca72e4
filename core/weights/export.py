"""What a converter must know of a model: how it can be spelled, and which of its weights may be rounded how far."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .. import storage
from ..types import Checkpoint, Identity, Spelling
from .keymap import Renamer, Share

WHOLE = Share()
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A tensor of a model as a spelling has it, `name` without the prefix.

    `parts` are the official names of the tensors it is made of, or of rows of these, one below the other. Most consist
    of one whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Share], ...]

    @property
    def official(self) -> str:
        """The name by which rules know it."""
        return self.parts[0][0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """How the model of one checkpoint can be written.

    `shapes` are those of its parameters by official name, leading ones included that a file may leave out.
    `spellings` are those it can be given, by the names that users know, and `respell` returns its tensors in one.
    `quantised` are patterns of the official names of weights that published quantised files round, less `whole`;
    `linears` are all of those that multiply rows (its embeddings, its head), for readers that take all or none;
    `float32` tells the parameters that are computed in float32. `carried` are patterns of names of the file that are
    no weights and go with it into every spelling; `marks` are empty tensors by which readers of some spellings tell the
    model. `told` is what a file must say of itself because its shapes don't. `gguf` names its architecture there, and
    `gguf_spelling` is how its tensors are called there.
    """

    shapes: Shapes
    spellings: Mapping[str, Spelling]
    respell: Callable[[Spelling], tuple[Piece, ...]]
    quantised: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    float32: Callable[[str], bool] = lambda name: False
    carried: tuple[str, ...] = ()
    marks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # mark -> names of the spellings that have it
    told: Mapping[str, Any] = field(default_factory=dict)
    gguf: str | None = None
    gguf_spelling: Spelling | None = None

    def is_quantised(self, official: str, all_linears: bool) -> bool:
        """Say whether a weight is one of those that published quantised files round, or one of all that may be."""
        if all_linears and self.linears:
            return fits(official, self.linears)
        return fits(official, self.quantised) and not fits(official, self.whole)


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a name fits one of the patterns, which may have `*`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def renamed(identity: Identity, shapes: Shapes) -> Callable[[Spelling], tuple[Piece, ...]]:
    """Return the function that names the tensors of a checkpoint by the table of a spelling, each whole."""

    def respell(spelling: Spelling) -> tuple[Piece, ...]:
        rename = Renamer(spelling.table)
        names = {official: rename(official) for official in identity.names if official in shapes}
        assert None not in names.values(), f"{spelling.name} lacks names"
        return tuple(
            Piece(name=name, shape=shapes[official], parts=((official, WHOLE),)) for official, name in names.items()
        )

    return respell


def stated_shapes(checkpoint: Checkpoint, identity: Identity) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights by official name, as the file states them."""
    return {
        official: checkpoint.tensors[file].shape
        for official, file in identity.names.items()
        if storage.companion(official) is None
    }
