"""Files as memory that nobody can write to."""

import mmap
import os
from pathlib import Path
from typing import BinaryIO

# What can't be written to is no memory of the process; of a map that can, though nobody writes, Windows counts every
# byte against RAM and page file. Private, as Linux has no shared ones of some network drives.
READ_ONLY = {"access": mmap.ACCESS_READ} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ}


def mapped(opened: BinaryIO, file: Path) -> mmap.mmap:
    """Return all of an open file, which must not be empty. Raises ValueError where the system can't map it."""
    try:
        return mmap.mmap(opened.fileno(), 0, **READ_ONLY)
    except OSError as error:
        raise ValueError(
            f"{file} can't be mapped into memory ({error.strerror}): if it is on a network drive, copy it to a disk of "
            "this machine; else close other programs"
        ) from error
