"""The pool against decode_clip in this process; processes looked at through /proc."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from operator import le
from pathlib import Path

import numpy as np
import pytest
from clips import ASSET, make_clip

from framework.data import workers
from framework.data.decode import decode_clip
from framework.data.workers import DecodeJob, DecodePool
from framework.shapes import ClipShape

pytestmark = pytest.mark.alone  # waits are timed

# Says its workers, begins jobs without end, and waits to be killed.
PARENT = """
import os, sys
from operator import le
from pathlib import Path
from framework.data.workers import DecodeJob, DecodePool
from framework.shapes import ClipShape
video = Path(sys.argv[1]).read_bytes()
pool = DecodePool(2)
for start in range(2):
    pool.submit(DecodeJob(video, start, ClipShape(17, 64, 64), 1.0, "a")).result()
if os.fork() == 0:  # holds the sockets after its parent's death, as a forked helper may
    import time
    time.sleep(20)
    os._exit(0)
futures = [pool.submit(DecodeJob(video, 0, ClipShape(120, 64, 64), 1.0, "a")) for _ in range(50)]
print("ready", flush=True)
futures[-1].result()
"""


@pytest.fixture(scope="module")
def video() -> bytes:
    return ASSET.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_clip(tmp_path_factory.mktemp("clips") / "small.mp4", frames=24, options={"g": "8"}).read_bytes()


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    with closing(DecodePool(1)) as made:
        yield made


def job(video: bytes, *, start: int = 0, clip: ClipShape = ClipShape(3, 48, 64), name: str = "a7") -> DecodeJob:  # noqa: B008
    return DecodeJob(video, start, clip, 1.0, name)


def children(parent: int) -> list[int]:
    """Decoding processes of a process."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            status, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if f"decode_worker\0{parent}\0".encode() in command and status.rpartition(")")[2].split()[0] != "Z":
            found.append(int(folder.name))
    return sorted(found)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def open_files(process: int) -> list[str]:
    """What a process has open or mapped that has a name in a file system."""
    folder = Path(f"/proc/{process}")
    names = [os.readlink(path) for path in (folder / "fd").iterdir() if path.is_symlink()]
    return names + [line.split(maxsplit=5)[5] for line in (folder / "maps").read_text().splitlines() if " /" in line]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_equals_decode_clip(video: bytes, num_workers: int) -> None:
    jobs = [
        DecodeJob(video, 0, ClipShape(5, 64, 96), 1.0, "a"),
        DecodeJob(video, 30, ClipShape(2, 72, 40), 2.5, "b", (0.1, 0.9)),
        DecodeJob(video, 3, ClipShape(1, 720, 1280), 1.0, "c"),
    ]
    with closing(DecodePool(num_workers)) as pool:
        futures = [pool.submit(job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            frames = future.result(timeout=60)
            expected = decode_clip(video, start=job.start, clip=job.clip, stride=job.stride, crop=job.crop)
            assert frames.dtype == np.uint8 and frames.flags.writeable and frames.flags.c_contiguous
            assert np.array_equal(frames, expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_are_those_of_decode_clip(small: bytes, num_workers: int) -> None:
    wrong = [
        job(b"no video", name="b\udcff"),
        job(small, start=22),
        job(small, start=-1),
        replace(job(small), crop=(2.0, 0.5)),
    ]
    with closing(DecodePool(num_workers)) as pool:
        for case in wrong:
            with pytest.raises(ValueError) as expected:
                workers._decode_here(case)
            with pytest.raises(ValueError) as found:
                pool.submit(case).result(timeout=60)
            assert str(found.value) == str(expected.value)
            assert case.name in str(found.value)
        assert pool.submit(job(small)).result(timeout=60).shape == (3, 48, 64, 3)  # the process goes on


def test_a_mistake_in_the_code_comes_with_its_traceback(small: bytes, pool: DecodePool) -> None:
    with pytest.raises(RuntimeError, match=r"a7: Traceback(.|\n)*decode_clip(.|\n)*TypeError"):
        pool.submit(DecodeJob(small, 0, ClipShape(3, 48, 64), None, "a7")).result(timeout=60)  # type: ignore[arg-type]


def test_a_process_killed_with_a_job_is_replaced(small: bytes, pool: DecodePool) -> None:
    expected = decode_clip(small, start=1, clip=ClipShape(3, 48, 64))
    pool.submit(job(small)).result(timeout=60)
    (first,) = children(os.getpid())
    os.kill(first, signal.SIGSTOP)  # so that it's surely not done
    future = pool.submit(job(small, start=1))
    assert wait_until(future.running, 5)
    time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    assert np.array_equal(future.result(timeout=60), expected)
    (second,) = children(os.getpid())
    assert second != first


def test_a_process_killed_while_it_waits_is_replaced(small: bytes, pool: DecodePool) -> None:
    expected = decode_clip(small, start=0, clip=ClipShape(3, 48, 64))
    for _ in range(2):
        assert np.array_equal(pool.submit(job(small)).result(timeout=60), expected)
        (process,) = children(os.getpid())
        os.kill(process, signal.SIGKILL)
    assert np.array_equal(pool.submit(job(small)).result(timeout=60), expected)


def test_a_video_of_which_two_processes_die_is_named(video: bytes, small: bytes, pool: DecodePool) -> None:
    pool.submit(job(small)).result(timeout=60)
    future = pool.submit(job(video, clip=ClipShape(130, 64, 64), name="heavy"))
    killed = set()
    while not future.done() and len(killed) < 2:
        for process in set(children(os.getpid())) - killed:
            time.sleep(0.05)
            os.kill(process, signal.SIGKILL)
            killed.add(process)
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"heavy: 2 processes that were decoding it died, the last one by signal 9"):
        future.result(timeout=60)
    assert time.monotonic() - begin < 0.5  # at once: no timeout is involved
    assert pool.submit(job(small)).result(timeout=60).shape == (3, 48, 64, 3)


def test_a_process_that_cannot_start_is_reported(
    small: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(workers, "worker_variables", lambda folder: {"PYTHONHOME": "/nowhere"})
    with closing(DecodePool(1)) as pool, pytest.raises(OSError, match=r"a7: 2 processes .* with status 1"):
        pool.submit(job(small)).result(timeout=60)
    assert "/nowhere" in capfd.readouterr().err


def test_processes_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    """While they decode, and though another child of the parent still holds their sockets."""
    command = [sys.executable, "-c", PARENT, str(ASSET)]
    variables = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True)
    assert parent.stdout and parent.stdout.readline() == "ready\n"
    processes = children(parent.pid)
    assert len(processes) == 2
    names = [name for process in (parent.pid, *processes) for name in open_files(process)]
    assert [name for name in names if name.startswith(("/dev/shm", str(tmp_path)))] == []
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not children(parent.pid), 2)
    assert list(tmp_path.iterdir()) == []
    parent.stdout.close()


def test_stop_signals_do_not_reach_the_processes(small: bytes, pool: DecodePool, capfd: pytest.CaptureFixture) -> None:
    (process,) = children(os.getpid())  # just started: blocked from the first moment on
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process, number)
    assert pool.submit(job(small)).result(timeout=60).shape == (3, 48, 64, 3)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process, number)
    assert pool.submit(job(small)).result(timeout=60).shape == (3, 48, 64, 3)
    assert children(os.getpid()) == [process]
    assert capfd.readouterr().err == ""
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_processes_import_neither_torch_nor_streaming() -> None:
    code = "import sys, framework.data.decode_worker, json; print(json.dumps(sorted(sys.modules)))"
    names = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert not {"torch", "streaming", "framework.data.workers"} & names
    assert {name for name in names if name.startswith("framework.")} == {
        *("framework.data", "framework.data.decode", "framework.data.decode_worker", "framework.shapes")
    }


def test_a_running_process_has_no_torch(small: bytes, pool: DecodePool) -> None:
    """By the libraries that it has mapped."""
    pool.submit(job(small)).result(timeout=60)
    (process,) = children(os.getpid())
    maps = Path(f"/proc/{process}/maps").read_text()
    assert "libavcodec" in maps and "torch" not in maps
    assert b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{process}/environ").read_bytes()


def test_many_shapes_share_the_processes(small: bytes) -> None:
    """30 buckets, interleaved: two processes, two threads, and no descriptor or memory that grows."""
    shapes = [ClipShape(1 + n % 5, 16 + 8 * n, 24 + 8 * (n % 7)) for n in range(30)]
    with closing(DecodePool(2)) as pool:
        processes = children(os.getpid())
        assert len(processes) == 2

        def run(rounds: int) -> None:
            futures = [
                pool.submit(job(small, clip=shape, start=n))
                for _ in range(rounds)
                for n, shape in enumerate(shapes[:18])
            ] + [pool.submit(job(small, clip=shape)) for _ in range(rounds) for shape in shapes[18:]]
            for future in futures:
                assert future.result(timeout=60).shape[3] == 3

        run(4)
        descriptors = num_descriptors(processes)
        growth = []
        for _ in range(4):
            memory = [resident(process) for process in processes]
            run(4)
            growth.append(max(resident(process) - first for process, first in zip(processes, memory, strict=True)))
        assert children(os.getpid()) == processes
        # A process closes its own a moment after it has sent it.
        assert wait_until(lambda: all(map(le, num_descriptors(processes), descriptors)), 5)
        assert min(growth) < 1e6, growth  # what leaks grows each time; the allocator's own settles
        assert sum(thread.name.startswith("decode-") for thread in threading.enumerate()) == 2
    assert children(os.getpid()) == []
    assert not any(thread.name.startswith("decode-") for thread in threading.enumerate())


def num_descriptors(processes: list[int]) -> list[int]:
    """Of this process and those."""
    return [len(os.listdir(f"/proc/{process}/fd")) for process in (os.getpid(), *processes)]


def resident(process: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_close_cancels_and_a_closed_pool_refuses(video: bytes) -> None:
    pool = DecodePool(1)
    pool.submit(job(video)).result(timeout=60)
    futures = [pool.submit(job(video, clip=ClipShape(120, 64, 64), name="late")) for _ in range(3)]
    assert wait_until(futures[0].running, 5)
    begin = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - begin < 1
    with pytest.raises(OSError, match="late: not decoded, the pool of decoding processes was closed"):
        futures[0].result(timeout=1)
    assert futures[1].cancelled() and futures[2].cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(job(video))
    assert children(os.getpid()) == []


def test_submit_does_not_wait(video: bytes, pool: DecodePool) -> None:
    begin = time.monotonic()
    futures = [pool.submit(job(video, clip=ClipShape(1, 32, 32))) for _ in range(6)]
    assert time.monotonic() - begin < 0.1
    done: list[int] = []
    for number, future in enumerate(futures):
        future.add_done_callback(lambda _, number=number: done.append(number))
    futures[-1].result(timeout=60)
    assert wait_until(lambda: len(done) == 6, 1) and done == list(range(6))


def test_any_path_of_the_parent_will_do(tmp_path: Path) -> None:
    """Started elsewhere, beside another package of the same name, with a path that was made by hand."""
    (tmp_path / "framework").mkdir()
    (tmp_path / "framework" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code = (
        f"import sys; sys.path.insert(1, {str(Path(workers.__file__).parents[2])!r})\n"
        + """
sys.path.remove('')
from framework.data.workers import DecodeJob, DecodePool
from framework.shapes import ClipShape
sys.path.pop(0)
pool = DecodePool(1)
video = open(sys.argv[1], "rb").read()
print(pool.submit(DecodeJob(video, 0, ClipShape(2, 32, 32), 1.0, "a")).result().shape)
"""
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(ASSET)]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(2, 32, 32, 3)\n", "")
