"""The tables of the paper, measured here: the same as ``fpet tables``, see ``--help``."""

from __future__ import annotations

import sys

try:
    from fpet import cli
except ImportError as missing:
    raise SystemExit(f"fpet is not installed here ({missing}): pip install -e '.[fpet,bench]'") from missing


def main() -> int:
    """``fpet tables`` with this script's arguments; the exit status."""
    return cli.main(["tables", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
