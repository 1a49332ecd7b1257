"""Each fault of the proxy does to a connection what its name says."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from chaos.proxy import Link, Proxy
from conftest import Peer
from fedfog.cli.broker import LocalBroker


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    yield running
    running.close()


@pytest.fixture
def echo(proxy: Proxy) -> Iterator[Link]:
    """A link to a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield proxy.link("x", server.getsockname(), mqtt=False)
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def connect(link: Link) -> socket.socket:
    """A connection that is through to the server."""
    connection = socket.create_connection(("127.0.0.1", link.port), 10)
    assert ask(connection, b"hello") == b"hello"
    return connection


def ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(1 << 16)


def test_cut_resets_and_close_ends_the_connection(echo: Link) -> None:
    with connect(echo) as connection:
        echo.fault("close")
        assert connection.recv(1) == b""
    with connect(echo) as connection:
        echo.fault("cut")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_frozen_link_passes_all_of_it_later(echo: Link) -> None:
    with connect(echo) as connection:
        began = time.monotonic()
        echo.fault("freeze", 0.5)
        assert ask(connection, b"late") == b"late"
        assert time.monotonic() - began >= 0.45


def test_half_open_connection_is_silent_for_ever_and_a_new_one_works(echo: Link) -> None:
    with connect(echo) as connection:
        echo.fault("half-open")
        connection.settimeout(0.5)
        with connect(echo), pytest.raises(TimeoutError):
            ask(connection, b"nobody hears this")


def test_refused_link_takes_no_connection_until_it_is_healed(echo: Link) -> None:
    connect(echo).close()
    echo.fault("refuse", 60)
    deadline = time.monotonic() + 10
    while True:  # until the fault has begun
        try:
            socket.create_connection(("127.0.0.1", echo.port), 10).close()
        except OSError:
            break
        assert time.monotonic() < deadline
    echo.heal()
    while True:
        try:
            connect(echo).close()
            return
        except OSError:
            assert time.monotonic() < deadline + 10


def test_delay_and_throttle_slow_a_link_down(echo: Link) -> None:
    with connect(echo) as connection:
        echo.fault("delay", 60, 0.2)
        began = time.monotonic()
        assert ask(connection, b"x") == b"x"
        assert time.monotonic() - began >= 0.4  # there and back
        echo.heal()
        echo.fault("throttle", 60, 1000)
        ask(connection, b"x" * 500)
        began = time.monotonic()
        assert ask(connection, b"y") == b"y"
        assert time.monotonic() - began >= 0.2


def test_messages_are_doubled_and_reordered_and_all_are_noted(
    proxy: Proxy, broker: LocalBroker, peers: Callable[..., Peer]
) -> None:
    link = proxy.link("x", (broker.host, broker.port))
    listener = peers(broker.port, "t/#")
    sender = peers(link.port)
    link.fault("reorder", amount=1)
    sent = threading.Thread(target=sender.publish, args=("t/1", b"held back"))
    sent.start()
    while not proxy.log:
        time.sleep(0.01)
    sender.publish("t/2", b"passes it", retain=True)
    sent.join(10)
    link.fault("duplicate", amount=1)
    sender.publish("t/3", b"twice")
    sender.publish("t/4", b"last")
    listener.on("t/4")
    order = [topic for topic, _ in listener.received]
    assert order == ["t/2", "t/1", "t/3", "t/3", "t/4"]
    assert [s.topic for s in proxy.log if s.up] == ["t/1", "t/2", "t/3", "t/4"]
    assert {s.service for s in proxy.log} == {"x"}
