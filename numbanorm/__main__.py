"""The command line: ``numbanorm`` and ``python -m numbanorm``."""

from __future__ import annotations

import sys

_EXTRA = {"click", "rich", "matplotlib"}


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from .cli.main import cli

        cli(prog_name="numbanorm")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f'numbanorm: the command line needs {error.name}; get it with: pip install "numbanorm[cli]"')


if __name__ == "__main__":
    main()
