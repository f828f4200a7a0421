"""Going on from the newest checkpoint, on whatever mesh."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from framework.checkpoint.find import Found, candidates, list_checkpoints, way_on
from framework.checkpoint.frozen import Frozen
from framework.checkpoint.manifest import DamagedCheckpoint
from framework.checkpoint.pieces import ReadStats
from framework.checkpoint.read import Checked, CheckpointReader
from framework.parallel.collectives import broadcast_object, gather_objects
from framework.parallel.fragments import Fragment
from framework.parallel.mesh import Group
from framework.storage.storage import Storage


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that was loaded. frozen: what it says of the weights that aren't trained. notes: what a person
    should know: damaged checkpoints that were passed over.
    """

    found: Found
    frozen: Frozen
    notes: tuple[str, ...]
    stats: ReadStats


@dataclass(frozen=True)
class Answer:
    """What rank 0 finds in the store, or why it can't be gone on from."""

    found: Found | None = None
    refusal: str | None = None


def resume(
    storage: Storage, fragments: list[Fragment], group: Group, *, fall_back: bool, near: Storage | None = None
) -> Resumed | None:
    """Load the newest checkpoint that counts, None where there is none. A collective.

    fall_back: go on from an older one where the newest is damaged. near: a node-local store of copies. Raises
    DamagedCheckpoint with the file, on every rank.
    """
    notes: list[str] = []
    search: Iterator[Found | DamagedCheckpoint] = iter(())
    if group.index == 0:
        search = candidates(storage, fall_back=fall_back)
    while True:
        answer = broadcast_object(next_answer(search, notes), group)
        if answer.refusal is not None:
            raise DamagedCheckpoint(answer.refusal)
        if answer.found is None:
            return None
        damage = None
        for place in dict.fromkeys((near, None)):
            reader, damage = load_everywhere(storage, answer.found, fragments, group, near=place)
            if damage is None:
                assert reader is not None
                return Resumed(answer.found, frozen_of(reader), tuple(notes), reader.stats)
            notes.append(f"{damage}; " + ("reading the store instead of the copy" if place else "passed over"))
        if not fall_back:
            older = []
            if group.index == 0:
                older = [entry for entry in list_checkpoints(storage)[0] if entry < answer.found.entry]
            raise DamagedCheckpoint(f"{damage}; {way_on(broadcast_object(older, group))}")


def next_answer(search: Iterator[Found | DamagedCheckpoint], notes: list[str]) -> Answer:
    """What to try next, on rank 0; damaged ones on the way become notes."""
    try:
        for item in search:
            if isinstance(item, Found):
                return Answer(item)
            notes.append(f"{item}; passed over")
    except (ValueError, OSError) as error:
        return Answer(refusal=str(error))
    return Answer(refusal=f"no checkpoint is whole: {notes[0]}. Start another run (run=DIR)") if notes else Answer()


def load_everywhere(
    storage: Storage, found: Found, fragments: list[Fragment], group: Group, *, near: Storage | None
) -> tuple[CheckpointReader | None, str | None]:
    """Load a checkpoint on all ranks and check every block of what they touched. Returns this rank's reader and what is
    damaged, the same on every rank. Raises ValueError, on every rank, where the checkpoint is of another model.
    """
    reader, part = load_here(storage, found, fragments, near)
    parts = gather_objects(part, group)
    agree(parts)
    damage = next((part.damage for part in parts if part.damage is not None), None)
    if damage is not None or reader is None:
        return None, damage
    touched = reader.files_of({state for part in parts for state in part.states})
    late = Part()
    try:
        reader.check_rest([part.checked for part in parts], touched=touched, index=group.index)
    except DamagedCheckpoint as error:
        late = Part(damage=str(error))
    except OSError as error:
        late = Part(mistake=str(error)) if near is None else Part(damage=str(error))
    everywhere = gather_objects(late, group)
    agree(everywhere)
    return reader, next((each.damage for each in everywhere if each.damage is not None), None)


@dataclass(frozen=True)
class Part:
    """How one rank's load went. damage, mistake: why it failed. checked: blocks that it has checked. states: that it
    read.
    """

    damage: str | None = None
    mistake: str | None = None
    checked: Checked = field(default_factory=dict)
    states: tuple[str, ...] = ()


def load_here(
    storage: Storage, found: Found, fragments: list[Fragment], near: Storage | None
) -> tuple[CheckpointReader | None, Part]:
    """This rank's load."""
    try:
        reader = CheckpointReader(storage, found, near=near)
        reader.load(fragments)
    except DamagedCheckpoint as error:
        return None, Part(damage=str(error))
    except (ValueError, OSError) as error:
        # A store that can't be read isn't a damaged checkpoint, which would be passed over; a copy that can't is.
        return None, Part(mistake=str(error)) if near is None else Part(damage=str(error))
    return reader, Part(checked=reader.checked(), states=tuple({fragment.state for fragment in fragments}))


def agree(parts: list[Part]) -> None:
    """Raises ValueError on every rank when one of them can't use the checkpoint."""
    mistake = next((part.mistake for part in parts if part.mistake is not None), None)
    if mistake is not None:
        raise ValueError(mistake)


def frozen_of(reader: CheckpointReader) -> Frozen:
    """What the checkpoint says of the weights that aren't trained."""
    shared = {
        key: tensor for key, tensor in reader.tensors.items() if any(b.file.startswith("../") for b in tensor.boxes)
    }
    files = {box.file for tensor in shared.values() for box in tensor.boxes}
    return Frozen(shared, {name: reader.found.manifest.files[name] for name in files})
