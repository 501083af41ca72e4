"""PyTorch's build for CUDA on a card whose memory is RAM, in processes of its Python; skipped where there is none.

`make test-card` sets one up. PyTorch's allocator, streams, events and what it asks of CUDA are real. Time is not, nor
are the kernels, whose work the CPU does in the order that the streams allow. A hollow card, for models of full size,
computes nothing.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("CUDA_PYTHON")
SECONDS = 1800
# Triton wants more of a driver than there is: runs do without our kernels, newer PyTorch without a few of its own.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TRITON_INTERPRET": "0",
    "TORCH_DISABLE_NATIVE_JIT": "1",
}

pytestmark = pytest.mark.skipif(PYTHON is None, reason="CUDA_PYTHON names no Python with PyTorch's build for CUDA 13")

Run = Callable[..., str]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what runs pytest with the card in place of CUDA, and gives back what it printed."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "wanqwen").symlink_to(ROOT)
    library = _build(folder / "libcuda.so.1")

    def run(*arguments: str, **settings: str) -> str:
        environment = {**os.environ, **SETTINGS, **settings, "LD_PRELOAD": str(library), "PYTHONPATH": str(folder)}
        command = [PYTHON, "-P", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=SECONDS, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        sys.stdout.write(done.stdout)
        return done.stdout

    return run


def _build(library: Path) -> Path:
    """Compile the card against the headers that PyTorch's CUDA packages bring."""
    found = subprocess.run(
        [PYTHON, "-c", "import nvidia; print(*nvidia.__path__)"], check=True, text=True, capture_output=True
    )
    includes = [f"-I{path}" for path in Path(found.stdout.split()[0]).glob("cu13/include")]
    sources = map(str, sorted(HERE.glob("*.c")))
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-pthread", *includes, "-Wl,-soname,libcuda.so.1", *sources, "-o",
         str(library), "-ldl"],
        check=True,
    )  # fmt: skip
    return library


NUMBERS = ("-p", "wanqwen.tests.card.plugin")
RTX_4090 = {"CARD_NAME": "NVIDIA GeForce RTX 4090", "CARD_CAPABILITY": "89"}
ALLOCATORS = {"native": {}, "async": {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}}  # ComfyUI takes the second


@pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)
def test_streamed_runs_on_cuda_have_the_bits_of_resident_ones(run: Run, allocator: dict[str, str]) -> None:
    slow = {"CARD_COPIES": "200", "CARD_CALLS": "50"}
    run(*NUMBERS, "tests/core/memory/test_cuda.py", **slow, **allocator)


def test_steps_ask_for_no_memory_and_wait_for_nothing_they_need_not(run: Run) -> None:
    run(*NUMBERS, "tests/card/inside/steps.py")


def test_two_hundred_faults_in_cuda_leave_nothing_behind(run: Run) -> None:
    run(*NUMBERS, "tests/card/inside/faults.py")


def test_models_of_full_size_take_what_was_planned(run: Run) -> None:
    hollow = {"CARD_HOLLOW": "1", "CARD_BYTES": str(80 << 30)}
    run("-s", "tests/core/test_planning.py", "tests/card/inside/peaks.py", **hollow, **RTX_4090)


def test_what_cuda_makes_is_what_the_cpu_makes(run: Run) -> None:
    run(*NUMBERS, "tests/card/inside/numbers.py", "tests/wan/test_text_encoder.py", "tests/wan/test_image_encoder.py",
        "tests/qwen_image/test_text_encoder.py")  # fmt: skip
