"""``python -m fpet.retrieval``: the same as ``fpet retrieval``."""

import sys

from ..cli import main

sys.exit(main(["retrieval", *sys.argv[1:]]))
