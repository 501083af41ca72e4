"""Kernels compile for every generation of cards, ahead of time and without one."""

import json
import os
import subprocess
import sys

import pytest
from wanqwen import kernels
from wanqwen.bench.registers import Usage, capabilities_of, table

pytest.importorskip("triton")


def test_every_kernel_compiles_and_spills_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: this one's Triton interprets, and the compiler ends a process that it fails in."""
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-m", "wanqwen.bench.registers", "--json"],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [Usage(**one) for one in json.loads(done.stdout)]
    with capsys.disabled():
        print("\n" + table(found))
    assert {(one.kernel, one.capability) for one in found} == {
        (name, capability) for name in kernels.KERNELS for capability in capabilities_of(name)
    }
    assert [one for one in found if one.local or not 0 < one.registers <= 255] == []
