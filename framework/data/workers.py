"""One pool of decoding processes for a rank, whatever the number of buckets.

Each process has a thread here that hands it one job at a time and waits for the frames, so that the death of a process
is seen at once, as the end of its socket. Processes are started anew (decode_worker.py), never forked from one that has
the threads of CUDA or gloo. Their frames come in memory without a name (memfd), which the kernel frees with the last
descriptor: after a kill nothing is left in /dev/shm. They are read into an array of this process rather than mapped,
because Python's mmap keeps a descriptor open, and a batch of images may have more of them than a process is allowed; a
copy takes 1 ms for 5 MB. Signals that ask a rank to stop are blocked in the processes, which go on until the rank has
saved.

Shapes: `T H W C` uint8: frames, rows, columns, RGB.
"""

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from framework.data.decode import decode_clip
from framework.data.decode_worker import FRAMES, JOB, REFUSED, REPLY
from framework.environment import DUMP_SIGNAL, STOP_SIGNALS, worker_variables
from framework.shapes import ClipShape

_MODULE: Final = "framework.data.decode_worker"
ATTEMPTS = 2  # processes that may die of one job


@dataclass(frozen=True)
class DecodeJob:
    """A clip of a video, as `decode_clip` takes it. video: the whole file."""

    video: bytes
    start: int
    clip: ClipShape
    stride: float
    name: str
    crop: tuple[float, float] | None = None


class DecodePool:
    """Decodes at most `num_workers` clips at a time, begun in the order in which they were submitted.

    num_workers: processes; with 0 `submit` itself decodes, in the calling thread. Raises OSError when one can't be
    started.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._queue: queue.SimpleQueue[tuple[DecodeJob, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker())
        except OSError:
            self.close()
            raise
        self._threads += [
            threading.Thread(target=self._run, args=(worker,), name=f"decode-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: DecodeJob) -> "Future[np.ndarray]":
        """The clip's frames to be, `T H W C` uint8, writable. Never waits for a process; the caller bounds how many.

        The future raises what `decode_clip` raises, ValueError naming the video; OSError naming it when two processes
        died of it; RuntimeError with the traceback for a mistake in here. A closed pool raises RuntimeError.
        """
        future: Future[np.ndarray] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of decoding processes is closed")
            if self._num_workers:
                self._queue.put((job, future))
                return future
        _fulfil(future, lambda: _decode_here(job))
        return future

    def close(self) -> None:
        """Cancel what hasn't begun, end the processes and wait for them; jobs under way raise OSError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with suppress(queue.Empty):
            while item := self._queue.get_nowait():
                item[1].cancel()
        for worker in self._workers:
            worker.close()
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, worker: "_Worker") -> None:
        while self._serve(worker):
            pass

    def _serve(self, worker: "_Worker") -> bool:
        """One job; a function of its own, so that nothing of it is kept while waiting for the next."""
        if (item := self._queue.get()) is None:
            return False
        job, future = item
        if future.set_running_or_notify_cancel():
            _fulfil(future, lambda: worker.decode(job))
        return True


class _Worker:
    """A process and the socket to it; a new process when it dies. Raises OSError when one can't be started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._process, self._socket = _start()

    def decode(self, job: DecodeJob) -> np.ndarray:
        """The clip, by the process. Raises as the future of `DecodePool.submit` does."""
        end = ""
        for _ in range(ATTEMPTS):
            if self._process.poll() is not None:  # died while it had nothing to do
                self._restart(job.name)
            try:
                _send_job(self._socket, job)
                reply = _receive(self._socket)
            except (EOFError, ConnectionError):
                end = self._how_it_ended()
                continue
            return _frames(job, *reply)
        with self._lock:
            closed = self._closed
        raise OSError(
            f"{job.name}: not decoded, the pool of decoding processes was closed"
            if closed
            else f"{job.name}: {ATTEMPTS} processes that were decoding it died, the last one {end}"
        )

    def close(self) -> None:
        """End the process; a job under way sees the end of its socket."""
        with self._lock:
            self._closed = True
            self._end()

    def _restart(self, name: str) -> None:
        with self._lock:
            if self._closed:
                raise OSError(f"{name}: not decoded, the pool of decoding processes was closed")
            self._end()
            self._process, self._socket = _start()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # a thread that waits for it is woken, which closing alone doesn't do
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _how_it_ended(self) -> str:
        """In words."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "without answering"
        if status >= 0:
            return f"with status {status}"
        return f"by signal {-status} ({signal.strsignal(-status)}; Killed: the memory may have run out)"


def _start() -> "tuple[subprocess.Popen[bytes], socket.socket]":
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", _MODULE, str(os.getpid())]
    environment = worker_variables(str(Path(__file__).parents[2]))
    # Inherited, and so in force from the first moment.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, DUMP_SIGNAL))
    try:
        return subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment), ours
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()


def _send_job(connection: socket.socket, job: DecodeJob) -> None:
    clip = (job.clip.frames, job.clip.height, job.clip.width)
    values = {"start": job.start, "clip": clip, "stride": job.stride, "name": job.name, "crop": job.crop}
    header = json.dumps(values).encode()
    connection.sendall(struct.pack(JOB, len(header), len(job.video)) + header)
    connection.sendall(job.video)


def _receive(connection: socket.socket) -> tuple[int, np.ndarray]:
    """Kind and content of a reply. Raises EOFError when the process is gone."""
    data, descriptors, _, _ = socket.recv_fds(connection, struct.calcsize(REPLY), 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise EOFError
    if not descriptors:
        raise OSError("no file descriptor is left for the frames of a decoding process: see `ulimit -n`")
    kind, size = struct.unpack(REPLY, data)
    with open(descriptors[0], "rb", buffering=0) as file:
        file.seek(0)  # the place is shared with the process, which has written up to the end
        content = np.empty(size, np.uint8)
        filled = 0
        while filled < size:  # one call reads 2 GB at most
            count = file.readinto(content.data[filled:])
            assert count, "a process sent less than it said"
            filled += count
    return kind, content


def _frames(job: DecodeJob, kind: int, content: np.ndarray) -> np.ndarray:
    if kind == FRAMES:
        return content.reshape(job.clip.frames, job.clip.height, job.clip.width, 3)
    text = content.tobytes().decode(errors="surrogatepass")
    raise ValueError(text) if kind == REFUSED else RuntimeError(f"{job.name}: {text}")


def _decode_here(job: DecodeJob) -> np.ndarray:
    return decode_clip(job.video, start=job.start, clip=job.clip, stride=job.stride, name=job.name, crop=job.crop)


def _fulfil(future: "Future[np.ndarray]", call: Callable[[], np.ndarray]) -> None:
    try:
        frames = call()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(frames)
