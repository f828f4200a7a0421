"""What makes a checkpoint valid: its manifest, written last.

    RUN/checkpoints/step-00000100/   *.distcp  .metadata  manifest.json

The manifest lists every file with its size. A directory without one, or with a file of another size, is not a
checkpoint:
an interrupted write is never taken for one.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from framework.run import write_atomically

MANIFEST = "manifest.json"
FORMAT = "cuboid.checkpoint/1"


@dataclass(frozen=True)
class Progress:
    """Where a run is. step: optimizer steps done, which with the recipe is the data position too."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    bad_steps: int = 0


@dataclass(frozen=True)
class Manifest:
    """mesh and zero_stage: what the checkpoint was written with. files: size in bytes by name."""

    progress: Progress
    mesh: dict[str, int]
    zero_stage: int
    attempt: int
    files: dict[str, int]
    format: str = FORMAT


def commit(path: Path, *, progress: Progress, mesh: dict[str, int], zero_stage: int, attempt: int) -> None:
    """Declare the files in `path` a checkpoint."""
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.name != MANIFEST}
    manifest = Manifest(progress, mesh, zero_stage, attempt, files)
    write_atomically(path / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a valid checkpoint, else None. Raises ValueError for a format of a later release."""
    try:
        fields = json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    if fields["format"] != FORMAT:
        raise ValueError(f"{path} has the format {fields['format']}, this release reads {FORMAT}")
    manifest = Manifest(**fields | {"progress": Progress(**fields["progress"])})
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return manifest if all(sizes.get(name) == size for name, size in manifest.files.items()) else None
