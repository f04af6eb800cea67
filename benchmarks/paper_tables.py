"""The tables of the paper, measured here: the same as ``fpet tables``, see ``--help``."""

from __future__ import annotations

import sys

try:
    from fpet.tables import main
except ImportError as missing:
    raise SystemExit(f"fpet is not installed here ({missing}): pip install -e '.[fpet,bench]'") from missing

if __name__ == "__main__":
    sys.exit(main())
