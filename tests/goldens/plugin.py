"""The option `--goldens DIR`, as a pytest plugin that pyproject.toml announces.

An option in conftest.py would be known too late: pytest takes what looks like a path on its command line for a place to
search for settings and conftest.py files, before it reads any.
"""

from pathlib import Path

import pytest

GOLDEN_TESTS = Path(__file__).resolve().with_name("test_goldens.py")
SETTINGS = GOLDEN_TESTS.parents[2] / "pyproject.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--goldens`."""
    parser.addoption(
        "--goldens",
        type=Path,
        metavar="DIR",
        help="wanqwen: run the golden checks, and nothing else, over every *.safetensors in this folder",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Start again with our settings where pytest has looked for them in the golden folder."""
    if config.getoption("goldens") is None or config.inipath == SETTINGS:
        return None
    return pytest.main([*config.invocation_params.args, "--config-file", str(SETTINGS)])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out all other tests when a folder is given."""
    is_other = collection_path.name.startswith("test_") and collection_path != GOLDEN_TESTS
    return True if is_other and config.getoption("goldens") is not None else None
