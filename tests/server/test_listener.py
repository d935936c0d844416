"""Sockets of the server, bound before anything slow starts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

import pytest
from logitserve.config import ServerConfig
from logitserve.http.listener import ListenError, bind

ABSENT = "192.0.2.1"
"""An address for documentation, which no machine has (RFC 5737)."""


@contextlib.contextmanager
def bound(config: ServerConfig) -> Iterator[Sequence[socket.socket]]:
    listeners = bind(config)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every host name stand for these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_a_port_is_taken_as_soon_as_it_is_bound() -> None:
    with bound(ServerConfig(port=0)) as (first,):
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=rf"port {port} of 127.0.0.1 is taken.*--port"):
            bind(ServerConfig(port=port))


def test_port_0_is_the_same_port_for_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.1")
    with bound(ServerConfig(host="twice", port=0)) as listeners:
        names = [listener.getsockname() for listener in listeners]
    assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
    assert names[0][1] == names[1][1] > 0


def test_an_address_of_a_name_that_is_not_ours_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case is localhost's IPv6 address where IPv6 is off."""
    resolving(monkeypatch, ABSENT, "127.0.0.1")
    with bound(ServerConfig(host="half", port=0)) as (listener,):
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_on_one_address_of_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the clients would reach another server. The addresses already bound are released."""
    with bound(ServerConfig(host="127.0.0.2", port=0)) as (other,):
        port = other.getsockname()[1]
        resolving(monkeypatch, "127.0.0.1", "127.0.0.2")
        with pytest.raises(ListenError, match=r"127\.0\.0\.2 is taken"):
            bind(ServerConfig(host="both", port=port))
        monkeypatch.undo()
        with bound(ServerConfig(port=port)):
            pass


@pytest.mark.parametrize(
    ("host", "says"),
    [
        (ABSENT, "no address of this machine"),
        ("nowhere.invalid", "cannot be resolved"),
        ("", "cannot be resolved"),
        ("a..b", "cannot be resolved"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_refused_by_its_flag(host: str, says: str) -> None:
    with pytest.raises(ListenError, match=rf"--host.*{says}"):
        bind(ServerConfig(host=host, port=0))


def test_a_forbidden_port_is_refused_by_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may listen on all ports, so the kernel's error is faked."""

    def forbid(_listener: socket.socket, _address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbid)
    with pytest.raises(ListenError, match=r"may not listen on port 80.*--port"):
        bind(ServerConfig(port=80))


def test_a_given_socket_must_carry_streams() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(ListenError, match=f"--fd {datagrams.fileno()} is no stream socket"),
    ):
        bind(ServerConfig(fd=datagrams.fileno()))


def test_with_listen_when_ready_a_port_is_bound_and_refuses_clients() -> None:
    with (
        bound(ServerConfig(port=0, listen_when_ready=True)) as (listener,),
        pytest.raises(ConnectionRefusedError),
    ):
        socket.create_connection(listener.getsockname())


def test_a_given_socket_cannot_listen_later() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ValueError, match="--listen-when-ready and --fd exclude each other"),
    ):
        ServerConfig(fd=listener.fileno(), listen_when_ready=True)
