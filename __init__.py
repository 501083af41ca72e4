"""ComfyUI-WanQwen: native Wan 2.1 for ComfyUI. Importing this does no work and needs no ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import Extension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Extension:
    """Return the extension that lists our nodes; ComfyUI calls this once at start-up."""
    from .nodes import Extension

    return Extension()
