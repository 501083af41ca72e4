"""Our models against references, over tests/fixtures/goldens or the folder of `--goldens DIR`.

One test per file, output and way of computing it. Whatever can't be run is a failure, never a skip.
"""

from pathlib import Path

import pytest
from wanqwen.tests.goldens.runner import checks, verify

FIXTURES = Path(__file__).parents[1] / "fixtures" / "goldens"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("goldens") or FIXTURES
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise pytest.UsageError(f"no *.safetensors in {folder.resolve()}: there is nothing to check")
    rows = [(path, *check) for path in files for check in checks(path)]
    metafunc.parametrize(("path", "key", "way"), rows, ids=[f"{path.stem}-{key}-{way}" for path, key, way in rows])


def test_golden(path: Path, key: str, way: str) -> None:
    verify(path, key, way)
