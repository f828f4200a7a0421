"""The process that decodes for a rank: `python -m framework.data.decode_worker PARENT`, started by workers.py.

Its standard input is a stream socket. Over it come

    job      <IQ: bytes of the header, of the video>  header (JSON: start, clip, stride, name, crop)  video
    reply    <BQ: kind, bytes of the content>, with the descriptor of a memfd that holds the content

so that frames cross without being serialised and nothing has a name that could be left behind in a file system. The
process ends when the socket closes, or when its parent is gone though some child of that one still holds the socket. It
imports neither torch nor streaming: it takes 60 MB.
"""

import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import numpy as np

from framework.data.decode import decode_clip
from framework.shapes import ClipShape

JOB: Final = "<IQ"
REPLY: Final = "<BQ"
# Kinds of a reply: frames `T H W C` uint8; the text of a ValueError; the traceback of anything else.
FRAMES: Final = 0
REFUSED: Final = 1
FAILED: Final = 2
PATIENCE = 0.5  # seconds between two looks at whether the parent lives


def main(parent: int, decode: Callable[..., np.ndarray] = decode_clip) -> None:
    """Decode what comes until the socket closes. parent: the process to end with. decode: called as `decode_clip`."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as jobs:
        while job := _read_job(jobs):
            header, video = job
            kind, content = _reply(decode, header, video)
            del job, video
            try:
                _send(connection, kind, content)
            except (BrokenPipeError, ConnectionResetError):
                return


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PATIENCE)
    os._exit(0)


def _read_job(jobs: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next job, or None when there will be no more."""
    try:
        sizes = jobs.read(struct.calcsize(JOB))
        if len(sizes) < struct.calcsize(JOB):
            return None
        header_size, video_size = struct.unpack(JOB, sizes)
        header, video = jobs.read(header_size), jobs.read(video_size)
    except ConnectionResetError:
        return None
    return (json.loads(header), video) if len(video) == video_size else None


def _reply(decode: Callable[..., np.ndarray], header: dict[str, Any], video: bytes) -> tuple[int, memoryview]:
    try:
        frames = decode(
            video,
            start=header["start"],
            clip=ClipShape(*header["clip"]),
            stride=header["stride"],
            name=header["name"],
            crop=header["crop"] and tuple(header["crop"]),
        )
    except ValueError as error:
        return REFUSED, memoryview(str(error).encode(errors="surrogatepass"))
    except Exception:
        return FAILED, memoryview(traceback.format_exc().encode())
    return FRAMES, np.ascontiguousarray(frames).data.cast("B")


def _send(connection: socket.socket, kind: int, content: memoryview) -> None:
    descriptor = os.memfd_create("cuboid-frames")
    try:
        written = 0
        while written < len(content):  # one call writes 2 GB at most
            written += os.write(descriptor, content[written:])
        socket.send_fds(connection, [struct.pack(REPLY, kind, len(content))], [descriptor])
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]))
