"""A proxy before an HTTP server, which does to the answers of data files what networks and servers do."""

import os
import re
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Literal, Self

Fault = Literal["refuse", "500", "503", "trickle", "truncate", "flip"]


class FaultyProxy:
    """Point AWS_ENDPOINT_URL at `url`.

    faults: of the next requests of data files, one each. always: of all after them. requests: (path, first byte) of
    those that were let through.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self._upstream = (host, int(port))
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.requests: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        self._before = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = self.url
        return self

    def __exit__(self, *_: object) -> None:
        os.environ["AWS_ENDPOINT_URL"] = self._before
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """The requests of one connection, without bodies, each by a connection of its own."""
        with suppress(OSError), client, client.makefile("rb") as lines:
            while head := read_head(lines):
                path = head.split(b" ", 2)[1].decode()
                fault = None
                if data := path.partition("?")[0].endswith(".mds"):
                    with self._lock:
                        fault = self.faults.popleft() if self.faults else self.always
                if fault == "refuse":
                    # Reset instead of an orderly end.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                if fault in ("500", "503"):
                    client.sendall(f"HTTP/1.1 {fault} Trouble\r\nContent-Length: 0\r\n\r\n".encode())
                    continue
                if data:
                    first = re.search(rb"range: bytes=(\d+)-", head, re.IGNORECASE)
                    self.requests.append((path, int(first[1]) if first else 0))
                with socket.create_connection(self._upstream) as server:
                    server.sendall(head)
                    with server.makefile("rb") as answer:
                        if not relay(answer, client, fault):
                            return


def read_head(lines: "socket.SocketIO") -> bytes:  # type: ignore[name-defined]
    """The head of a request or answer; empty at the end of a connection."""
    head = b""
    while line := lines.readline():
        head += line
        if line == b"\r\n":
            return head
    return b""


def relay(answer: "socket.SocketIO", client: socket.socket, fault: Fault | None) -> bool:  # type: ignore[name-defined]
    """Pass an answer on, with a fault; whether the connection is still good."""
    head = read_head(answer)
    client.sendall(head)
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    size = int(length[1]) if length else 0
    cut = size // 2 if fault == "truncate" else size
    done = 0
    while done < cut and (piece := answer.read(100 if fault == "trickle" else min(1 << 16, cut - done))):
        if fault == "flip" and not done:
            piece = piece[:-1] + bytes([piece[-1] ^ 1])
        client.sendall(piece)
        done += len(piece)
        if fault == "trickle":
            time.sleep(0.05)
    return done == size
