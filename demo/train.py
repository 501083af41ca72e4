"""Train the miniature checkpoints from nothing but their corpora and write them in the published key names.

    python -m wanqwen.demo.train [clips] [cards] [--work FOLDER] [--out demo/checkpoints]

`clips` are the six files of the miniature Wan, `cards` the four of the miniature Qwen-Image; without either, both.
They are read by the same loaders as the published ones. A run that was stopped goes on where it was. Wan's files for
text to video, and those for pictures, are not trained again where `out` holds them all.
"""

import argparse
import logging
from pathlib import Path

from .cards import recipe as cards
from .clips import recipe as clips

RECIPES = {"clips": clips.train, "cards": cards.train}


def main() -> None:
    """Train what `work` does not hold yet, then write the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*RECIPES, []], help="clips, cards; both if none is given")
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="where to keep the state of training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoints")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in options.which or RECIPES:
        RECIPES[name](options.work, options.out)


if __name__ == "__main__":
    main()
