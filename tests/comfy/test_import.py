"""What the pack costs when ComfyUI starts."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.3  # of this process: what others do on the machine is left out
HEAVY = (
    "transformers",
    "accelerate",
    "sentencepiece",
    "ftfy",
    "diffusers",
    "triton",
    "av",
    "PIL",
    "tokenizers",
    "gguf",
)

# As main.py does it, up to the custom nodes: ours is then the only thing that happens between the two looks.
SCRIPT = """
import asyncio, json, sys, time
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config  # before `nodes` puts another `utils` first on the path
import nodes, server
async def main():
    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_builtin_extra_nodes()
    before, start = set(sys.modules), time.process_time()
    loaded = await nodes.load_custom_node(PACK, module_parent="custom_nodes")
    seconds = time.process_time() - start
    new = sorted({name.split(".")[0] for name in set(sys.modules) - before if not name.startswith("/")})
    print("RESULT" + json.dumps({"loaded": loaded, "seconds": seconds, "new": new}))
asyncio.run(main())
"""


def test_import_is_light_and_quick(comfyui, tmp_path):
    """Our files are compiled, as any start but the first finds them, also where Python may not write such files."""
    home, python = comfyui
    ours = [str(path) for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    subprocess.run([python, "-m", "compileall", "-q", *ours], check=True, timeout=120)
    link = tmp_path / "wanqwen"
    link.symlink_to(ROOT)
    finished = subprocess.run(
        [python, "-c", SCRIPT.replace("PACK", repr(str(link)))],
        cwd=home, env={**os.environ, "PYTHONPATH": str(home)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    [line] = [line for line in finished.stdout.splitlines() if line.startswith("RESULT")]
    result = json.loads(line.removeprefix("RESULT"))
    assert result["loaded"] and not set(HEAVY) & set(result["new"]), result["new"]
    assert result["seconds"] < SECONDS, f"{result['seconds']:.2f} s"
