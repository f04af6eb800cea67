"""Fused token-merging kernels with a hand-written backward: ``from fpet_kernels import bdm_merge``.

``python -m fpet_kernels`` says what is active on this machine, what is not, and why.
"""

from .backends import explain
from .merge import KeyRefinement, Merged, bdm_merge, bdm_unmerge
from .split import Split, alternating, checkerboard, checkerboard_3d, second_checkerboard
from .version import __version__

__all__ = [
    "KeyRefinement",
    "Merged",
    "Split",
    "__version__",
    "alternating",
    "bdm_merge",
    "bdm_unmerge",
    "checkerboard",
    "checkerboard_3d",
    "explain",
    "second_checkerboard",
]
