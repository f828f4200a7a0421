"""WebDataset shards (github.com/webdataset/webdataset): tars in which the files of one sample follow each other and
share their name up to the first dot of its last part.

A sample is its video, by the suffix, with `.txt` (the caption) or `.json` (the keys of a line of captions; others are
left alone, as such files hold what their makers wanted). Tars are read from the beginning to the end, once.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path, PurePosixPath

from framework.curate.captions import CaptionLine, caption_line
from framework.curate.inputs import Found, Input, Reader, Skip, is_video
from framework.curate.share import Share
from framework.data.shards import MAX_SAMPLE_BYTES

_SAID = ("caption", "captions", "source", "licence", "scores")
_SIDECARS = (".txt", ".json")
_BRACES = re.compile(r"\{([^{}]*)\}")
_LARGEST_SIDECAR = 1 << 24
TAR_END = 1024  # bytes, all zero, that end a tar; tarfile takes anything that is no header for the end


def tar_urls(source: str, reader: Reader) -> list[str]:
    """The tars that a source names: one, a brace pattern (`{00000..00099}`, `{a,b}`), or a folder or prefix of them;
    none where it is no such thing, as a folder with videos in it. Raises OSError.
    """
    if source.endswith(".tar"):
        return _expanded(source)
    if "://" not in source and not Path(source).is_dir():
        return []
    names = sorted(reader.below(source))
    if any(is_video(name) for name in names):
        return []
    return [f"{source.rstrip('/')}/{name}" for name in names if name.endswith(".tar")]


def tar_inputs(urls: list[str], reader: Reader, share: Share) -> Found:
    """The samples of a share's tars. Whole tars are shared out, by their places in the list."""
    files = Counter(url.rpartition("/")[2] for url in urls)
    for url in share.of(urls):
        file = url.rpartition("/")[2]
        name = file if files[file] == 1 else url
        try:
            with reader.open(url) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                yield from _samples(tar, name)
                end = tar.offset
            if not reader.is_zero(url, end, TAR_END):
                yield Skip(name, "broken", f"{url} ends or is damaged at byte {end}, after what was read of it")
        except FileNotFoundError as error:
            yield Skip(name, "no such file", str(error))
        except tarfile.TarError as error:
            yield Skip(name, "broken", f"{url}, after what was read of it: {error}")
        except OSError as error:
            yield Skip(name, "can't be read", f"after what was read of it: {error}")


def _samples(tar: tarfile.TarFile, name: str) -> Found:
    """The samples of one tar."""
    members: dict[str, bytes | int] = {}
    before = ""
    for member in tar:
        key, suffix = _key(member.name)
        if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
            continue
        if key != before:
            yield from _sample(f"{name}/{before}", members)
            members, before = {}, key
        limit = MAX_SAMPLE_BYTES if is_video(suffix) else _LARGEST_SIDECAR if suffix in _SIDECARS else 0
        file = tar.extractfile(member)
        assert file is not None
        # What isn't needed is left in the tar; of what is too large the size is kept, to be reported.
        members[suffix] = file.read() if member.size <= limit else member.size
    yield from _sample(f"{name}/{before}", members)


def _key(path: str) -> tuple[str, str]:
    """`a/b.c.mp4` -> `a/b`, `.c.mp4`: what the files of a sample share, and the rest."""
    folder, _, file = path.removeprefix("./").rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), dot + suffix.lower()


def _sample(name: str, members: dict[str, bytes | int]) -> Found:
    """The videos of one sample; one, as a rule."""
    videos = [suffix for suffix in members if is_video(suffix)]
    try:
        line = _line(members)
    except ValueError as error:
        yield from (Skip(name + suffix, "no caption", str(error)) for suffix in videos)
        return
    for suffix in videos:
        video = members[suffix]
        size = video if isinstance(video, int) else len(video)
        yield Input(name + suffix, line, _given(video), size, costly=True)
    if members and not videos:
        suffixes = ", ".join(members)
        yield Skip(name, "not a video", f"its files end in {suffixes}")


def _given(video: bytes | int) -> Callable[[], bytes]:
    """How to get what is there already. Of a video that is too large only the size is, by which it is skipped."""
    return lambda: video if isinstance(video, bytes) else b""


def _line(members: dict[str, bytes | int]) -> CaptionLine | None:
    """What a sample's own files say of it. Raises ValueError."""
    for suffix in _SIDECARS:
        size = members.get(suffix)
        if isinstance(size, int):
            raise ValueError(f"its {suffix} has {size} bytes")
    text, data = members.get(".txt"), members.get(".json")
    try:
        caption = text.decode().strip() if isinstance(text, bytes) else ""
        read = json.loads(data) if isinstance(data, bytes) else {}
    except ValueError as error:
        raise ValueError(f"its .txt or .json can't be read: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"its .json holds no object, but {type(read).__name__}")
    said = {key: value for key, value in read.items() if key in _SAID and value is not None}
    if "caption" not in said and "captions" not in said and caption:
        said["caption"] = caption
    return caption_line(said) if "caption" in said or "captions" in said else None


def _expanded(pattern: str) -> list[str]:
    """The names that a brace pattern stands for, in order. Raises ValueError."""
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece, pattern) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
        raise ValueError(f"{pattern}: a range in braces is two numbers, such as {{00000..00099}}, found {{{inside}}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
