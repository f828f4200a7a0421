"""Where the nodes of a health check meet without torch: the first rank answers at MASTER_ADDR:MASTER_PORT.

It tells its clock, by which the others tell theirs, and the port of the store over which ranks find each other:

    -> {"node": "node3"}      <- {"time": 1790000000.123, "store": 41234}

An exchange that took t seconds gives the clocks' difference within t / 2; the shortest of a few is taken (Cristian,
"Probabilistic clock synchronization", 1989). A time stamp of the shared file system would not do: Lustre and GPFS stamp
files by the client's clock.
"""

import json
import socket
import socketserver
import threading
import time
from dataclasses import dataclass

EXCHANGES = 5
ANSWER_SECONDS = 5.0  # for one exchange


@dataclass(frozen=True)
class Answer:
    """clock: seconds by which this node's clock is ahead of the first node's. store: the port of the ranks' store."""

    clock: float
    store: int


class Meeting(socketserver.ThreadingTCPServer):
    """The first rank's part. store: told to those who ask; 0 = there is none. nodes: those that have asked all."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, *, store: int) -> None:
        self.store = store
        self.nodes: set[str] = set()
        super().__init__(("", port), Host)
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Nobody is answered any more."""
        self.shutdown()
        self.server_close()


class Host(socketserver.StreamRequestHandler):
    """One node's exchanges."""

    timeout = ANSWER_SECONDS

    def handle(self) -> None:
        meeting = self.server
        assert isinstance(meeting, Meeting)
        node = None
        try:
            for line in self.rfile:
                answer = {"time": time.time(), "store": meeting.store}
                node = str(json.loads(line)["node"])
                self.wfile.write(json.dumps(answer).encode() + b"\n")
        except (OSError, ValueError, KeyError, TypeError):
            return  # somebody else's knock
        if node is not None:
            meeting.nodes.add(node)


def ask(address: tuple[str, int], node: str, deadline: float) -> Answer:
    """Meet the first rank, which may come later than this one. deadline: of time.monotonic. Raises OSError."""
    while True:
        try:
            return exchange(address, node, min(ANSWER_SECONDS, max(0.1, deadline - time.monotonic())))
        except (OSError, ValueError, KeyError) as error:
            if time.monotonic() > deadline:
                raise OSError(f"the first rank doesn't answer at {address[0]}:{address[1]}: {error}") from None
        time.sleep(0.2)


def exchange(address: tuple[str, int], node: str, timeout: float) -> Answer:
    """A few exchanges over one connection. timeout: of each of them, and of the connection."""
    found: list[tuple[float, float]] = []
    with socket.create_connection(address, timeout=timeout) as connection, connection.makefile("rwb") as file:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(EXCHANGES):
            before, begin = time.time(), time.perf_counter()
            file.write(json.dumps({"node": node}).encode() + b"\n")
            file.flush()
            answer = json.loads(file.readline())
            spent = time.perf_counter() - begin
            found.append((spent, before + spent / 2 - float(answer["time"])))
    return Answer(clock=min(found)[1], store=int(answer["store"]))
