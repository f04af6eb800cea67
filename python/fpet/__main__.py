"""``python -m fpet``: the same as the command ``fpet``."""

import sys

from .cli import main

sys.exit(main())
