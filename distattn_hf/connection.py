"""Whether the Hub can be reached at all, asked before its client is. Needs no torch."""

import socket
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
