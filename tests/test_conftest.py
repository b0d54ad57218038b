"""The guards of conftest.py hold."""

import socket

import pytest


@pytest.mark.parametrize("address", [("127.0.0.1", 9), ("192.0.2.1", 80)])
def test_no_connection(address: tuple[str, int]) -> None:
    with socket.socket() as plug, pytest.raises(RuntimeError, match="open no socket"):
        plug.connect(address)


def test_no_name_lookup() -> None:
    with pytest.raises(RuntimeError, match="open no socket"):
        socket.create_connection(("example.org", 80), timeout=1)


@pytest.mark.ddp
def test_processes_of_a_distributed_test_may_use_the_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    with socket.socket() as plug, pytest.raises(RuntimeError, match="open no socket"):
        plug.connect(("192.0.2.1", 80))
