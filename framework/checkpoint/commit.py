"""What makes a checkpoint valid: its manifest, written last.

    RUN/checkpoints/step-00000100/   *.distcp  .metadata  manifest.json

The manifest lists every file with its size. A directory without one, or with a file of another size, is not a
checkpoint: an interrupted write is never taken for one.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from framework.parallel.config import MeshShape
from framework.run import CHECKPOINTS, write_atomically

MANIFEST = "manifest.json"
FORMAT = "cuboid.checkpoint/1"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    step: steps done, which with the recipe is the data position too. updates: those whose update wasn't skipped, which
    is what Adam's bias correction counts. bad_steps: updates skipped in a row.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
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


@dataclass(frozen=True)
class Found:
    """A valid checkpoint."""

    path: Path
    manifest: Manifest


def valid_checkpoints(folder: Path) -> list[Found]:
    """All valid checkpoints, oldest first."""
    candidates = ((path, read_manifest(path)) for path in sorted(folder.glob("step-*")))
    return [Found(path, manifest) for path, manifest in candidates if manifest is not None]


def newest_checkpoint(folder: Path, shape: MeshShape, zero_stage: int) -> Found | None:
    """The newest valid checkpoint. Raises ValueError when it is of another mesh or stage."""
    found = valid_checkpoints(folder)
    if not found:
        return None
    manifest, shape_here = found[-1].manifest, mesh_of(shape)
    here = shape_here | {"stage": zero_stage}
    there = manifest.mesh | {"stage": manifest.zero_stage}
    if here != there:
        names = {"stage": "zero.stage"} | {axis: f"mesh.{axis}" for axis in shape_here}
        fix = " ".join(f"{names[k]}={there[k]}" for k in here if here[k] != there[k])
        raise ValueError(
            f"the run's newest checkpoint is of {there}, this start is {here}: resuming on another mesh or ZeRO stage "
            f"isn't there yet; resume with {fix}"
        )
    return found[-1]


def newest_of_run(run: Path) -> Found:
    """The newest valid checkpoint of a run, of whatever mesh. Raises ValueError when there is none."""
    found = valid_checkpoints(run / CHECKPOINTS)
    if not found:
        raise ValueError(f"{run} has no checkpoint yet: train it further, or lower checkpoint.every")
    return found[-1]


def mesh_of(shape: MeshShape) -> dict[str, int]:
    """The degrees as a manifest holds them."""
    return dataclasses.asdict(shape)


def finished_steps(folder: Path) -> int:
    """Optimizer steps of the newest valid checkpoint in `folder`, 0 when there is none."""
    return max((found.manifest.progress.step for found in valid_checkpoints(folder)), default=0)
