"""What makes a checkpoint valid: its manifest, written last.

    STORE/step-00000100-0002/   .metadata  model-00000.distcp ...  manifest.json       step 100, by attempt 2
          frozen/               weights that aren't trained, once
          fence/  named/        fence.py, retention.py

The manifest lists every file with its size and a checksum of each of its blocks, so that a reader can check what it
reads where it reads it. Without a manifest a folder isn't a checkpoint: an interrupted write is never taken for one.
With one, whatever doesn't agree with it is damage, and refused by name. Attempts write into folders of their own, so
that two at once can't mix their files.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

import xxhash

from framework.data.windows import Windows, data_step
from framework.storage.storage import Storage

MANIFEST = "manifest.json"
METADATA = ".metadata"
FORMAT = "cuboid.checkpoint/2"
FORMAT_PATTERN: Final = re.compile(r"cuboid\.checkpoint/(\d+)")
FOLDER: Final = re.compile(r"step-(\d{8,})-(\d{4,})")
BLOCK = 4 << 20  # bytes under one checksum


class DamagedCheckpoint(ValueError):
    """A committed checkpoint that isn't what its manifest says. The message names the file."""


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    step: steps done, which with the recipe and what was left out is the data position too. updates: those whose update
    wasn't skipped, which is what Adam's bias correction counts. bad_steps: updates skipped in a row. skipped: windows
    of data that were left out. norms: of the last good updates' gradients, by which the next are judged.

    stage: the one that goes on from here, so after the last one their number; 0 in a run without. stage_step,
    stage_samples, stage_data: step, samples and data step at which it began. evaluations: of a stage that a plateau
    ends, the best validation loss and then the last ones.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    bad_steps: int = 0
    skipped: Windows = ()
    norms: tuple[float, ...] = ()
    stage: int = 0
    stage_step: int = 0
    stage_samples: int = 0
    stage_data: int = 0
    evaluations: tuple[float, ...] = ()

    def next_stage(self) -> "Progress":
        """At the end of a stage: where the next one begins. Its batches and so its gradients are others."""
        return dataclasses.replace(
            self,
            bad_steps=0,
            norms=(),
            stage=self.stage + 1,
            stage_step=self.step,
            stage_samples=self.samples,
            stage_data=self.data_step,
            evaluations=(),
        )

    @property
    def trained_stage(self) -> int:
        """The stage of the last step, which where that ended a stage is the one before `stage`."""
        return self.stage - 1 if self.stage and self.step == self.stage_step else self.stage

    @property
    def data_step(self) -> int:
        """The data that the next step takes."""
        return data_step(self.skipped, self.step)


@dataclass(frozen=True)
class StoredFile:
    """size: bytes. checksums: XXH3 (64 bits, hexadecimal) of each block of BLOCK bytes."""

    size: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """What wrote a checkpoint. recipe: hash of the resolved recipe. data: hash of its data
    files, and the sizes of the buckets' draws. parents: what it descends from: the checkpoint that
    its attempt resumed from, or the weights that the run began with.
    """

    attempt: int = 0
    mesh: dict[str, int] = field(default_factory=dict)
    engine: str = ""
    zero_stage: int = 0
    precision: str = ""
    recipe: str = ""
    data: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """files: by their name relative to the checkpoint's folder. config: of the model (by diffusers' names) and of its
    adapters.
    """

    progress: Progress
    origin: Origin
    files: dict[str, StoredFile]
    config: dict[str, Any] = field(default_factory=dict)
    block: int = BLOCK
    format: str = FORMAT


def block_checksum(data: memoryview | bytes) -> str:
    """The checksum of one block."""
    return xxhash.xxh3_64_hexdigest(data)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, with a checksum of itself."""
    fields = dataclasses.asdict(manifest)
    return (json.dumps(fields | {"checksum": checksum_of(fields)}, indent=1) + "\n").encode()


def checksum_of(fields: dict[str, Any]) -> str:
    """Of a manifest's fields, however they are laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def decode_manifest(data: bytes, name: str) -> Manifest:
    """Read a manifest. Raises DamagedCheckpoint, also for the format of another release."""
    try:
        fields = json.loads(data)
        form = str(fields["format"])
    except (ValueError, TypeError, KeyError):
        raise DamagedCheckpoint(f"{name} is no manifest: it is cut off or overwritten") from None
    if form != FORMAT:
        theirs, ours = FORMAT_PATTERN.fullmatch(form), FORMAT_PATTERN.fullmatch(FORMAT)
        later = bool(theirs and ours and int(theirs[1]) > int(ours[1]))
        fix = "install the cuboid that wrote it" if later else "it was written by an older cuboid"
        raise DamagedCheckpoint(f"{name} has the format {form}, this release reads {FORMAT}: {fix}")
    if fields.pop("checksum", None) != checksum_of(fields):
        raise DamagedCheckpoint(f"{name} doesn't agree with its own checksum")
    files = {file: StoredFile(value["size"], tuple(value["checksums"])) for file, value in fields["files"].items()}
    origin = Origin(**fields["origin"] | {"parents": tuple(fields["origin"]["parents"])})
    return Manifest(**fields | {"progress": progress_of(fields["progress"]), "origin": origin, "files": files})


def progress_of(fields: dict[str, Any]) -> Progress:
    """Progress from JSON; what an older release didn't write has its default."""
    skipped = tuple((int(at), int(length)) for at, length in fields.get("skipped", ()))
    floats = {name: tuple(fields.get(name, ())) for name in ("norms", "evaluations")}
    return Progress(**fields | {"skipped": skipped} | floats)


@dataclass(frozen=True, order=True)
class Entry:
    """A committed checkpoint, as its folder's name says."""

    step: int
    attempt: int

    @property
    def folder(self) -> str:
        return f"step-{self.step:08}-{self.attempt:04}"


def entry_of(name: str) -> Entry | None:
    """The checkpoint to which an object belongs, None where to none."""
    match = FOLDER.fullmatch(name.partition("/")[0])
    return Entry(int(match[1]), int(match[2])) if match else None


def committed(names: dict[str, int]) -> list[Entry]:
    """The checkpoints with a manifest among a store's objects, oldest step first."""
    found = (entry_of(name) for name in names if name.endswith("/" + MANIFEST))
    return sorted(entry for entry in found if entry is not None)


def read_manifest(storage: Storage, entry: Entry, names: dict[str, int]) -> Manifest:
    """The manifest of a checkpoint whose files are all there in their sizes. Raises DamagedCheckpoint otherwise.

    names: the store's objects with their sizes.
    """
    name = f"{entry.folder}/{MANIFEST}"
    manifest = decode_manifest(storage.read(name), f"{storage.url}/{name}")
    for file, stored in manifest.files.items():
        path = resolve(entry.folder, file)
        size = names.get(path)
        if size is None:
            raise DamagedCheckpoint(f"{storage.url}/{path} is missing")
        if size != stored.size:
            raise DamagedCheckpoint(f"{storage.url}/{path} has {size} bytes, its manifest says {stored.size}")
    return manifest


def resolve(folder: str, file: str) -> str:
    """The store's name of a manifest's file: of its own folder, or of a shared one ("../frozen/...")."""
    if file.startswith("../"):
        return file.removeprefix("../")
    return f"{folder}/{file}"
