"""A TCP line to a server on this machine, which a test can cut, stop, spoil and mend, whatever is spoken on it."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable

FAULTS = ("refusing", "hanging", "closing", "resetting", "garbage", "cut")


class Wire:
    """Listens on a free port and passes everything on to `port`; a context manager.

    - refusing: nobody listens
    - hanging: the connection is taken, and nothing is read or said
    - closing: it is closed at once
    - resetting: the headers and half of the body are read, and the rest is answered by a reset, which `in_mid_body`
      counts; a request without a body passes
    - garbage: the answer is bytes that are no protocol
    - cut: the line is dropped as soon as `arrived()` is true, before a byte of the answer to it has passed
    """

    def __init__(self, port: int) -> None:
        self._behind = port
        self._fault: str | None = None
        self._arrived: Callable[[], bool] = lambda: False
        self._ends: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.connections = 0
        self.in_mid_body = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._listen()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_listening()
        self._drop()
        for thread in self._threads:
            thread.join(10)

    def spoil(self, fault: str, arrived: Callable[[], bool] = lambda: False) -> None:
        """From now on `fault`; connections that are there end, except for `cut`."""
        assert fault in FAULTS
        self._arrived = arrived
        self._fault = fault
        if fault == "refusing":
            self._stop_listening()
        if fault != "cut":
            self._drop()

    def mend(self) -> None:
        """From now on all is well."""
        refused = self._fault == "refusing"
        self._fault = None
        self._drop()
        if refused:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._listen()

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._start(self._accept, self._listener)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
        self._listener.close()

    def _drop(self) -> None:
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            _hang_up(end)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._ends.add(client)
                self.connections += 1
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        fault = self._fault
        with contextlib.suppress(OSError):
            if fault == "hanging":
                return
            if fault == "resetting":
                bodiless = _read_into_body(client)
                if bodiless is not None:
                    self._pass_on(client, bodiless)
                    return
                self.in_mid_body += 1
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif fault == "garbage":
                client.recv(1024)
                client.sendall(b"\x00\xff\x15garbage\r\n\r\n")
            elif fault in (None, "cut"):
                self._pass_on(client)
        _hang_up(client)

    def _pass_on(self, client: socket.socket, start: bytes = b"") -> None:
        server = socket.create_connection(("127.0.0.1", self._behind))
        with self._lock:
            self._ends.add(server)
        server.sendall(start)
        self._start(self._pump, server, client, True)
        self._pump(client, server, False)

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self._fault == "cut" and self._arrived():
                    break
                target.sendall(data)
        _hang_up(source)
        _hang_up(target)


def _read_into_body(client: socket.socket) -> bytes | None:
    """Read a request up to the middle of its body; one without a body is given back, to be the last of its connection.

    Of HTTP/1.1 the headers and half of the body are read. Of HTTP/2 all up to the first frame of data and half of that,
    with the answers without which no client of gRPC would send one.
    """
    start = _exactly(client, len(_PREFACE))
    if start == _PREFACE:
        client.sendall(_frame(_SETTINGS) + _frame(_SETTINGS, flags=_ACK))
        while True:
            head = _exactly(client, 9)
            length = int.from_bytes(head[:3], "big")
            if head[3] == _DATA:
                _exactly(client, length // 2)
                return None
            content = _exactly(client, length)
            if head[3] == _PING and not head[4] & _ACK:
                client.sendall(_frame(_PING, content, flags=_ACK))
    while b"\r\n\r\n" not in start:
        start += _exactly(client, 1)
    said = re.search(rb"(?i)\r\ncontent-length: *(\d+)", start)
    if said is None or int(said[1]) == 0:
        return start.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    _exactly(client, int(said[1]) // 2)
    return None


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _SETTINGS, _PING, _ACK = 0, 4, 6, 1  # RFC 9113, section 6


def _frame(kind: int, content: bytes = b"", *, flags: int = 0) -> bytes:
    """A frame of HTTP/2 on the connection itself."""
    return len(content).to_bytes(3, "big") + bytes((kind, flags)) + bytes(4) + content


def _exactly(client: socket.socket, count: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: it ended before.
    """
    data = b""
    while len(data) < count:
        more = client.recv(count - len(data))
        if not more:
            raise ConnectionError("the client has gone")
        data += more
    return data


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        if not end.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[0]:
            end.shutdown(socket.SHUT_RDWR)  # wakes who waits for it; a socket set to reset must not say goodbye first
    end.close()
