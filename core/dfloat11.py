"""How DFloat11 groups lie in a file: their planes, and the sizes of these. They are decoded in `core.ops.dfloat11`.

Source of the format: Zhang et al. 2025, "70% Size, 100% Accuracy", and the published files. A group is one stream for
the weights of several layers. A window is 8 bytes of the codes, a section 512 windows.
"""

from collections.abc import Mapping, Sequence
from math import prod

# U8, all of them: the codes; a byte per weight, its sign and 7 bits of mantissa; tables that turn a byte of a code into
# an exponent or point to the table for the next byte, and last the lengths of the codes; of each section the index of
# the first weight whose code begins in it, and after them n, 4 bytes each; of each window the place of the first code
# that begins in it, 5 bits each.
PLANES = ("encoded_exponent", "sign_mantissa", "luts", "output_positions", "gaps")
WINDOW_BYTES, SECTION_WINDOWS, GAP_BITS, POSITION_BYTES = 8, 512, 5, 4
SECTION_BYTES = WINDOW_BYTES * SECTION_WINDOWS
WINDOW_BITS, LONGEST_CODE, TABLE = 8 * WINDOW_BYTES, 32, 256
POINTERS = 240  # entries from here on point: 256 - entry is the number of a table
MOST_TABLES = 1 + TABLE - POINTERS


def num_sections(num_bytes: int) -> int:
    """Return how many sections a stream of so many bytes has."""
    return -(-num_bytes // SECTION_BYTES)


def check_sizes(shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raise ValueError unless the planes of a group, by name, are of sizes that belong together."""
    if missing := [name for name in PLANES if name not in shapes]:
        raise ValueError(f"{where}: a DFloat11 group without {', '.join(missing)}: download it again")
    sections = num_sections(prod(shapes["encoded_exponent"]))
    wanted = {
        "output_positions": POSITION_BYTES * (sections + 1),
        "gaps": sections * SECTION_WINDOWS * GAP_BITS // 8,
    }
    tables = shapes["luts"]
    fits = all(prod(shapes[name]) == size for name, size in wanted.items()) and prod(shapes["sign_mantissa"]) > 0
    if not fits or len(tables) != 2 or tables[1] != TABLE or not 2 <= tables[0] <= MOST_TABLES + 1:
        sizes = ", ".join(f"{name} {list(shapes[name])}" for name in PLANES)
        raise ValueError(f"{where}: the parts of a DFloat11 group don't belong together ({sizes}): download it again")
