"""What decoding random segments costs: frames decoded for each frame used, against ffmpeg, and against torchcodec.

    PYTHONPATH=. python tools/bench/decode.py --repeats 9        # torchcodec only where it's installed

Videos: the test clip as it is (one keyframe in 132 frames), and the same encoded anew by x264 with a keyframe at least
every second and with its default of 250 frames. All decoders use one thread a process.

segments   frames that the decoder gave and milliseconds of CPU, for each frame used, over random segments
ffmpeg     frames a second of a whole decode: `ffmpeg -f null`, PyAV's decoder, and PyAV with colours converted
pool       clips a second through the same DecodePool, PyAV against torchcodec, and whether their frames are equal
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
from interleave import interleave, ratio, ratio_lines, time_lines
from machine import machine

from framework.data import decode, workers
from framework.data.decode import decode_clip
from framework.data.workers import DecodeJob, DecodePool
from framework.shapes import ClipShape

ASSET = Path(__file__).parents[2] / "tests" / "assets" / "bigbuckbunny.mp4"
CLIPS = (ClipShape(17, 256, 256), ClipShape(65, 256, 256))


def videos(folder: Path) -> dict[str, Path]:
    """Name -> file."""
    made = {"as it is": ASSET}
    for name, options in (("keyframe a second", ("-g", "25")), ("x264's default", ())):
        path = folder / f"{len(made)}.mp4"
        command = ["ffmpeg", "-v", "error", "-i", str(ASSET), "-an", "-c:v", "libx264", *options, str(path)]
        subprocess.run(command, check=True)
        made[name] = path
    return made


@contextmanager
def counted(counts: list[int]) -> Iterator[None]:
    """Adds one to counts[0] for each frame that the decoder gives."""
    original = decode._decode

    def counting(*words: object, **named: object) -> Iterator[av.VideoFrame]:
        for frame in original(*words, **named):  # type: ignore[arg-type]
            counts[0] += 1
            yield frame

    with patch.object(decode, "_decode", counting):
        yield


def num_frames(path: Path) -> int:
    return decode.probe(path).frames


def segment_lines(path: Path, clip: ClipShape, num_segments: int) -> str:
    """One line of the table of segments."""
    video, room, draw = path.read_bytes(), num_frames(path) - clip.frames + 1, random.Random(0)
    starts = [draw.randrange(room) for _ in range(num_segments)]
    ideal, counts = 0, [0]
    with av.open(str(path)) as container:
        keys = sorted(p.pts for p in container.demux(video=0) if p.size and p.is_keyframe and p.pts is not None)
        stream = container.streams.video[0]
        numbers = [round(float(pts * stream.time_base * stream.average_rate)) for pts in keys]
    for start in starts:
        ideal += start + clip.frames - max(number for number in numbers if number <= start)
    begin = time.process_time()
    with counted(counts):
        for start in starts:
            decode_clip(video, start=start, clip=clip)
    spent, used = time.process_time() - begin, num_segments * clip.frames
    return f"{clip!s:12}{len(keys):10}{counts[0] / used:16.2f}{ideal / used:18.2f}{1e3 * spent / used:14.1f}"


def timer(step: Callable[[], None], num_steps: int) -> tuple[float, float]:
    """Wall and CPU seconds a step, with those of child processes that have ended."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, spent = time.perf_counter(), cpu()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - wall) / num_steps, (cpu() - spent) / num_steps


def whole_decodes(path: Path) -> Mapping[str, Callable[[], None]]:
    """Every frame of a video, by one thread."""

    def pyav(*, colours: bool) -> None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if colours:
                    frame.to_ndarray(format="rgb24")

    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), "-an", "-f", "null", "-"]
    return {
        "ffmpeg": lambda: subprocess.run(command, check=True) and None,
        "PyAV": lambda: pyav(colours=False),
        "PyAV, RGB": lambda: pyav(colours=True),
    }


def compare_pools(path: Path, clip: ClipShape, *, num_workers: int, num_repeats: int) -> None:
    """Batches of random clips through two pools that differ in the decoder alone."""
    video, room = path.read_bytes(), num_frames(path) - clip.frames + 1
    draw = random.Random(0)
    starts = [draw.randrange(room) for _ in range(8)]
    jobs = [DecodeJob(video, start, clip, 1.0, "video") for start in starts]

    def batch(pool: DecodePool) -> list[np.ndarray]:
        return [future.result() for future in [pool.submit(job) for job in jobs]]

    with closing(DecodePool(num_workers)) as pyav:
        with patch.object(workers, "_MODULE", "torchcodec_worker"):
            torchcodec = DecodePool(num_workers)
        with closing(torchcodec):
            equal = [np.array_equal(*pair) for pair in zip(batch(pyav), batch(torchcodec), strict=True)]
            steps = {"PyAV": lambda: batch(pyav) and None, "torchcodec": lambda: batch(torchcodec) and None}
            timings = interleave(steps, num_repeats=num_repeats, num_steps=1, warmup=1)
            memory = [max(resident(worker._process.pid) for worker in pool._workers) for pool in (pyav, torchcodec)]
    rate = {name: len(jobs) / timing.median("wall") for name, timing in timings.items()}
    r = ratio(timings["torchcodec"], timings["PyAV"], "wall")
    print(
        f"{clip!s:12}{rate['PyAV']:10.2f}{rate['torchcodec']:14.2f}{r.paired:12.3f}   {r.low:.3f} to {r.high:.3f}"
        f"{'yes' if all(equal) else 'NO':>8}{memory[0] / 1e6:12.0f}{memory[1] / 1e6:12.0f}"
    )


def resident(process: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


def full_size_equal(path: Path) -> bool:
    """Whether PyAV's frames and torchcodec's are the same bits before any resize."""
    from torchcodec_worker import full_frames

    with av.open(str(path)) as container:
        ours = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return np.array_equal(ours, full_frames(path.read_bytes(), start=0, frames=len(ours), stride=1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    words = parser.parse_args()
    with_torchcodec = find_spec("torchcodec") is not None
    for name, value in machine("av", "pillow", *(["torchcodec"] if with_torchcodec else [])).items():
        print(f"{name:12}{value}")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in videos(Path(folder)).items():
            print(f"\n{name}: {num_frames(path)} frames of 1280x720")
            print(f"{'segments':12}{'keyframes':>10}{'decoded / used':>16}{'from keyframe':>18}{'CPU ms/used':>14}")
            for clip in CLIPS:
                print(segment_lines(path, clip, words.segments))
            timings = interleave(whole_decodes(path), num_repeats=words.repeats, num_steps=1, warmup=1, timer=timer)
            print(*time_lines(timings, "whole decode, ms"), sep="\n")
            print(*ratio_lines(timings, (("PyAV", "ffmpeg"), ("PyAV, RGB", "PyAV"))), sep="\n")
            if with_torchcodec:
                print(f"full-size frames of torchcodec equal PyAV's: {full_size_equal(path)}")
                print(
                    f"{'pool':12}{'PyAV/s':>10}{'torchcodec/s':>14}{'time ratio':>12}   {'quartiles':14}{'equal':>8}"
                    f"{'PyAV MB':>12}{'t.codec MB':>12}"
                )
                for clip in CLIPS:
                    compare_pools(path, clip, num_workers=words.workers, num_repeats=words.repeats)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
