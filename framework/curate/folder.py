"""The videos of a local folder, recursively and sorted; hidden files are left out."""

from pathlib import Path

from framework.curate.inputs import SUFFIXES, Found, Input, Skip, is_video
from framework.curate.share import Share


def folder_inputs(videos: Path, captions: Path | None, out: str, share: Share) -> Found:
    """captions, out: the file of captions and the shards to be made, which are no videos where they lie in the folder.

    Raises ValueError without such a folder.
    """
    own_captions, own_out = captions and captions.resolve(), Path(out).resolve()
    names: list[str] = []
    for path in sorted(videos.rglob("*")):
        name = path.relative_to(videos)
        hidden = any(part.startswith(".") for part in name.parts)
        own = path.resolve() == own_captions or path.resolve().is_relative_to(own_out)
        if hidden or own or (path.is_dir() and not path.is_symlink()) or not share.takes(name.as_posix()):
            continue
        if not path.is_file():
            detail = "a linked folder isn't followed, a link to nothing is none"
            yield Skip(name.as_posix(), "not a video", detail)
        elif is_video(path.name):
            names.append(name.as_posix())
        else:
            yield Skip(name.as_posix(), "not a video", f"its name doesn't end in {', '.join(SUFFIXES)}")
    for text in sorted(names):
        path = videos / text
        yield Input(text, None, path.read_bytes, path.stat().st_size)
