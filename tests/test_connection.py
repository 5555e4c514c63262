"""Whether the Hub is in reach is asked of the host that its address names."""

import socket

import pytest

from distattn_hf import connection


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        ("https://huggingface.co", "huggingface.co"),
        ("http://localhost:8000/hub", "localhost"),
        ("http://[::1]:8000", "::1"),
        ("https://user:word@mirror.example", "mirror.example"),
    ],
)
def test_the_host_of_an_endpoint(endpoint, host, monkeypatch):
    """Breaks if an address in brackets, a port or a name before the host is taken for the host: then nothing loads."""
    asked = []
    monkeypatch.setattr(connection, "getproxies", dict)
    monkeypatch.setattr(connection.hub, "ENDPOINT", endpoint)
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: asked.append(name))
    assert connection.hub_in_reach()
    assert asked == [host]
