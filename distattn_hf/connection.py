"""Whether the Hub can be reached at all, asked before its client is. Needs no torch."""

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub


def hub_in_reach() -> bool:
    """Return False if the Hub's host name does not resolve: the client would retry for half a minute before failing."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def hub_arguments(source: str | Path) -> dict[str, bool]:
    """Return {"local_files_only": ...} for every file of a folder or Hub name: out of reach, the cache alone is asked.

    The client would try each file again for half a minute.
    """
    return {"local_files_only": not (Path(source).is_dir() or hub.HF_HUB_OFFLINE or hub_in_reach())}
