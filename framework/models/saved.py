"""Where diffusers has saved a transformer: the directory that a person's word for it means; torch isn't needed to know.

A pipeline's directory has a subfolder for each of its models: `transformer`, and in Wan 2.2 `transformer_2` beside it.
"""

from pathlib import Path

CONFIG = "config.json"
TRANSFORMER = "transformer"
SECOND = "transformer_2"


def is_diffusers(place: str) -> bool:
    """Whether a word is for `DiffusersSource`, be it to say what is wrong with it."""
    if "://" in place:
        return False
    if ":" in place and not Path(place).exists():
        return True
    directory, _ = find_directory(place)
    return (directory / CONFIG).is_file()


def find_directory(place: str) -> tuple[Path, tuple[str, ...]]:
    """The directory that `DIR[:SUBFOLDER]` means, and what a person should know of the choice."""
    root, colon, folder = place.rpartition(":")
    if colon and not Path(place).is_dir():
        if folder in ("", ".", "..") or "/" in folder:
            raise ValueError(f"{place}: write DIR:SUBFOLDER, with the plain name of a subfolder, as in {root}:{SECOND}")
        return Path(root) / folder, ()
    directory = Path(place)
    inner = directory / TRANSFORMER
    if (directory / CONFIG).is_file() or not (inner / CONFIG).is_file():
        return directory, ()
    if not (directory / SECOND / CONFIG).is_file():
        return inner, ()
    note = f"{place} holds two transformers: {TRANSFORMER} (the expert of high noise) was taken; the other one is "
    return inner, (f"{note}{place}:{SECOND}",)
