"""Let tests run on the card in RAM: `pytest -p wanqwen.tests.card.plugin`, with the card loaded."""

import os
from collections.abc import Iterator

import pytest

from .card import CardInRam, card_in_ram


@pytest.fixture(autouse=True)
def card() -> Iterator[CardInRam]:
    """Compute on the card what the test asks of CUDA."""
    with card_in_ram(
        copies=int(os.environ.get("CARD_COPIES", "0")), calls=int(os.environ.get("CARD_CALLS", "0"))
    ) as there:
        yield there
