"""Pre-trained weights from the network: one attempt, and an error that says which file is wanted and how to pass it."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_attempt"]

_SECONDS = 5


@contextmanager
def one_attempt() -> Iterator[None]:
    """Inside, where the Hub can't be reached, files come from the cache or fail at once, not after a minute of attempts."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    if urllib.request.getproxies():
        return True  # a proxy may reach what this machine can't
    parts = urllib.parse.urlsplit(address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=_SECONDS):
            return True
    except OSError:
        return False
