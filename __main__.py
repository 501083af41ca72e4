"""python -m wanqwen: the pack from a terminal."""

import argparse
import io
import logging
import sys
from importlib import import_module

# Name -> a word of help. A command's module, in commands/, is imported for that command only.
COMMANDS = {
    "demo": "generate and score clips, pictures and edits with the bundled miniatures",
    "generate": "a prompt to a video or a picture, or an edit of pictures",
    "inspect": "say what a checkpoint or a LoRA is, reading its header only",
    "plan": "what a run takes of a card, from the model's header alone",
    "download": "fetch published files into ComfyUI's models folder",
    "convert": "a model in other names, or in another format",
    "doctor": "which kernels work on this machine, and how well",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a request that can't be met, with one clear line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a pipe on Windows may lack letters of a file's name
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="wanqwen", description="Wan 2.1 and Qwen-Image, from a terminal")
    parser.add_argument("--verbose", action="store_true", help="show what is being done")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in COMMANDS.items():
        command = commands.add_parser(name, help=does)
        if name in given:
            import_module(f".commands.{name}", __package__).add_arguments(command)
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"wanqwen {options.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
