"""Several directories of shards -> one, by its index: `cuboid data merge`.

What lies below the new place already stays where it is; what lies elsewhere is copied to a folder there, named as it
was. Of samples that are in several, the first is kept (data/merge.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from framework.curate.share import share_of_folder
from framework.data.merge import REWRITTEN, Contents, Duplicate, joined, moved, without_duplicates, write_top
from framework.data.parts import RECORD, REPORT
from framework.data.shard_writer import refuse_other
from framework.data.shards import EMPTY_TEXT, MARKER, ShardDirectory, json_bytes, open_shards, parse_json
from framework.storage.storage import Storage, open_source, open_storage

BLOCK = 1 << 24


@dataclass(frozen=True)
class MergeReport:
    """duplicates: the samples that were left out."""

    out: str
    sources: tuple[str, ...]
    num_samples: int
    num_copied: int
    duplicates: tuple[Duplicate, ...]


def merge_directories(urls: Sequence[str], out: str) -> MergeReport:
    """Make `out` one directory of what others hold. May be done again, also after it was stopped.

    urls: finished directories, or the place of the shares of several jobs, which stands for all of these. Raises
    ValueError: nothing there, one that is unfinished, directories of another schema, tokenizer or text.
    """
    store = open_storage(out.rstrip("/"))
    sources = list(dict.fromkeys(each for url in urls for each in _directories(url.rstrip("/"), store.url)))
    directories = [open_shards(url) for url in sources]
    if not directories:
        raise ValueError(f"nothing to merge in {', '.join(urls)}: no share has a sample")
    first = directories[0]
    identity = {"schema": first.schema, "tokenizer": first.tokenizer_version, "text": first.text_version}
    for directory in directories[1:]:
        found = {"schema": directory.schema, "tokenizer": directory.tokenizer_version, "text": directory.text_version}
        refuse_other(directory.url, identity, found)
    files = _texts(directories)
    folders = [_folder(directory.url, store.url) for directory in directories]
    if twice := [name for name, count in Counter(folder for folder, _ in folders).items() if count > 1]:
        raise ValueError(f"several of the directories are called {twice[0]}: move them below {out} or rename them")
    contents = []
    for directory, (folder, _) in zip(directories, folders, strict=True):
        shards = parse_json(directory.store.read("index.json"), f"{directory.url}/index.json")["shards"]
        contents.append(Contents(moved(shards, folder), directory.index))
    _check_out(store, {_name_of(shard): _hash_of(shard) for each in contents for shard in each.shards})
    copied = sum(
        _copy(directory, store, folder)
        for directory, (folder, inside) in zip(directories, folders, strict=True)
        if not inside
    )
    whole, duplicates = without_duplicates(store, joined(contents))
    write_top(store, identity, whole, files)
    report = MergeReport(store.url, tuple(sources), len(whole.index), copied, tuple(duplicates))
    store.put(REPORT, json_bytes({"duplicates": [asdict(each) for each in duplicates]}))
    return report


def _check_out(store: Storage, coming: Mapping[str, str]) -> None:
    """Raises ValueError where the new place holds data that the sources don't. coming: file -> sha1."""
    names = store.list()
    if "index.json" not in names:
        return
    fix = "merge it too, by its folders, or name another --out"
    if MARKER not in names:
        raise ValueError(f"{store.url} holds an index.json that isn't of `cuboid`: name another --out")
    for shard in parse_json(store.read("index.json"), f"{store.url}/index.json")["shards"]:
        name = _name_of(shard)
        if name.startswith(f"{REWRITTEN}/"):
            continue
        if name not in coming:
            raise ValueError(f"{store.url} holds {name} already, which isn't among what is to be merged: {fix}")
        if coming[name] != _hash_of(shard):
            raise ValueError(f"{store.url} holds another {name} already than is to be merged: {fix}")


def _name_of(shard: Mapping[str, Any]) -> str:
    return str(shard["raw_data"]["basename"])


def _hash_of(shard: Mapping[str, Any]) -> str:
    return str(shard["raw_data"]["hashes"]["sha1"])


def merge_lines(report: MergeReport) -> list[str]:
    """What `cuboid data merge` prints."""
    lines = [f"{report.out}: {report.num_samples} samples of {len(report.sources)} directories"]
    lines += [f"left out {each.uid} of {each.dropped}: {each.kept} has it" for each in report.duplicates]
    return [*lines, f"{len(report.duplicates)} duplicates left out, {report.num_copied} files copied"]


def _directories(url: str, out: str) -> list[str]:
    """The directories that a place stands for: itself, or the shares in it that have a sample."""
    store = open_source(url)
    try:
        names = store.list()
    except OSError as error:
        raise ValueError(str(error)) from None
    folders = {name.split("/")[0] for name in names}
    shares = sorted((s for s in map(share_of_folder, folders) if s), key=lambda share: (share.count, share.index))
    if not shares or (MARKER in names and store.url != out):
        if store.url == out:
            raise ValueError(f"{url} can't be merged into itself: name another --out")
        return [url]
    if len(counts := sorted({share.count for share in shares})) > 1:
        raise ValueError(f"{url} has shares of {' and of '.join(map(str, counts))}: name the directories to be merged")
    finished = {share.index for share in shares if f"{share.folder}/{REPORT}" in names}
    if missing := sorted(set(range(counts[0])) - finished):
        raise ValueError(
            f"{url}: {len(missing)} of {counts[0]} shares aren't finished, {missing[0]}/{counts[0]} for one: run "
            f"that job again, it goes on"
        )
    return [f"{url}/{share.folder}" for share in shares if f"{share.folder}/{MARKER}" in names]


def _folder(url: str, out: str) -> tuple[str, bool]:
    """A directory's place below the new one, and whether it lies there already."""
    if "://" in url or "://" in out:
        inside = url.startswith(f"{out}/")
        return (url.removeprefix(f"{out}/"), True) if inside else (url.rpartition("/")[2], False)
    place, root = Path(url).resolve(), Path(out).resolve()
    inside = place.is_relative_to(root) and place != root
    return (place.relative_to(root).as_posix(), True) if inside else (place.name, False)


def _texts(directories: Sequence[ShardDirectory]) -> dict[str, bytes]:
    """The empty caption's embedding, which all must have alike."""
    found = {d.url: d.store.read(EMPTY_TEXT) if d.empty_text is not None else None for d in directories}
    (url, first), *others = found.items()
    for other, data in others:
        if data != first:
            raise ValueError(f"{other}/{EMPTY_TEXT} isn't what {url}/{EMPTY_TEXT} is: other texts are stored there")
    return {} if first is None else {EMPTY_TEXT: first}


def _copy(directory: ShardDirectory, store: Storage, folder: str) -> int:
    """Copy a directory's parts; how many files."""
    sizes = directory.store.list()
    names = [file.name for file in directory.files]
    names += [name for name in sizes if name.endswith(f"/{RECORD}")]
    for name in names:
        writer = store.open_writer(f"{folder}/{name}")
        try:
            for start in range(0, sizes[name], BLOCK):
                block = bytearray(min(BLOCK, sizes[name] - start))
                directory.store.read_into(name, start, [memoryview(block)])
                writer.write(memoryview(block))
            writer.close()
        except BaseException:
            writer.abort()
            raise
    return len(names)
