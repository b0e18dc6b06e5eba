"""The console scripts: serving an export needs no torch, everything else goes to `lit_clipq.cli`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lit_clipq.errors import ConfigError, LitClipqError

EXPORT, SERVE = "export", "serve"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Tell a mistake in one sentence, as everything else does."""
        raise ConfigError(f"{self.prog}: {message}")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 after an error that is told in one line, 130 if interrupted.

    `export ARTEFACT TARGET` and `serve FOLDER` are commands of their own; what remains, `export --config ...` included,
    is Lightning's.
    """
    given = list(sys.argv[1:] if args is None else args)
    positional = len(given) > 1 and not given[1].startswith("-")
    command = given[0] if given else ""
    if not (command == SERVE or (command == EXPORT and positional)):
        from lit_clipq.cli import main as lightning

        return lightning(given)
    try:
        if command == SERVE:
            _serve(given[1:])
        else:
            _export(given[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except (LitClipqError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _export(args: Sequence[str]) -> None:
    parser = _Parser("lit-clipq export", description="Export a saved quantized model as ONNX of integer products.")
    parser.add_argument("artefact", type=Path, help="Folder of a model that was kept with --quantize.save.")
    parser.add_argument("target", type=Path, help="Folder that is written.")
    parser.add_argument("--format", default="onnx", help="Of the towers: onnx.")
    parser.add_argument("--fallback", default="refuse", help="Layers without an integer form: refuse, or float.")
    parser.add_argument("--force", action="store_true", help="Replace an export that is there.")
    chosen = parser.parse_args(args)
    from lit_clipq.export import ExportOptions, export_artefact, told

    options = ExportOptions(str(chosen.target), chosen.format, chosen.fallback, chosen.force)
    print(told(export_artefact(chosen.artefact, options)))  # noqa: T201


def _serve(args: Sequence[str]) -> None:
    parser = _Parser("lit-clipq serve", description="Search pictures by text on a web page of this machine.")
    parser.add_argument("folder", type=Path, help="Folder of an export.")
    parser.add_argument("--pictures", type=Path, required=True, help="Folder of the pictures to search.")
    parser.add_argument("--port", type=int, default=8000, help="Port on localhost; 0 takes a free one.")
    parser.add_argument("--threads", type=int, default=None, help="Threads of one product.")
    chosen = parser.parse_args(args)
    from lit_clipq.runtime.serve import serve

    serve(chosen.folder, chosen.pictures, port=chosen.port, threads=chosen.threads)


if __name__ == "__main__":
    sys.exit(main())
