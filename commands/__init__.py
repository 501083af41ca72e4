"""The larger commands of `python -m wanqwen`: arguments, and calls."""
