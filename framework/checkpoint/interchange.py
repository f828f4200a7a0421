"""Checkpoints to and from other formats, and compared: what `cuboid checkpoint export`, `import` and `diff` do.

All of it goes one tensor at a time, so that a machine with less memory than the model has will do.
"""

import struct
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Literal

import torch

from framework.checkpoint.fence import claim, own
from framework.checkpoint.find import open_checkpoint
from framework.checkpoint.manifest import MANIFEST, METADATA, Entry, Manifest, Origin, Progress, encode_manifest
from framework.checkpoint.read import CheckpointReader
from framework.checkpoint.records import StoredTensor, TensorOfRecord, encode_metadata, file_head
from framework.checkpoint.source import CheckpointSource, Weights
from framework.checkpoint.write import Range, lay_out, put_checksummed, write_boxes
from framework.models.config import LoraConfig, ModelConfig, RopeConfig, is_adapter
from framework.models.export import (
    Merged,
    Planned,
    check_complete,
    check_room,
    copy_tensor,
    plan_tensors,
    read_whole,
    total_bytes,
    write_diffusers,
    write_lora,
)
from framework.models.source import TensorSource
from framework.models.weights import DiffusersSource
from framework.parallel.fragments import ParameterShard
from framework.run import versions
from framework.storage.storage import open_storage

Format = Literal["diffusers", "torch", "lora"]


@dataclass(frozen=True)
class ExportRequest:
    """What to export. weights: the average or the live ones. merge: add the adapters to their linears. step: None is
    the newest.
    """

    format: Format
    weights: Weights = "ema"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    merge: bool = False
    step: int | None = None


def export(place: str, out: Path, request: ExportRequest) -> list[str]:
    """Write the weights of a checkpoint for others, after a check of all that is read. Returns lines to print. Raises
    ValueError, for a damaged file too.
    """
    reader = CheckpointReader(*open_checkpoint(place, step=request.step))
    held = CheckpointSource(reader, request.weights)
    if not held.average:
        request = replace(request, weights="raw")
    config, lora = configs_of(reader)
    rope = RopeConfig(**reader.found.manifest.config.get("rope", {}))
    if rope.time != "none" and request.format != "torch":
        raise ValueError(
            f"{held.name} was trained with rope.time={rope.time} rope.factor={rope.factor:g}, which diffusers has no "
            "field for: it would run these weights at other positions. --format torch exports them as they are"
        )
    has_adapters = any(is_adapter(name) for name in held.shapes())
    source: TensorSource = held
    if request.merge and request.format == "lora":
        raise ValueError(
            "--merge-lora with --format lora: merged weights have no adapters left; use --format diffusers"
        )
    if request.merge:
        if not has_adapters:
            raise ValueError(f"--merge-lora: {held.name} has no adapters")
        source = Merged(held, lora)
    elif has_adapters and request.format == "diffusers":
        raise ValueError(
            f"{held.name} has adapters, which a diffusers model has no room for: add --merge-lora, or export them by "
            "--format lora"
        )
    held.check()
    dtype: torch.dtype = getattr(torch, request.dtype)
    card = model_card(reader, source, request, out.name)
    match request.format:
        case "diffusers":
            write_diffusers(out, config, source, dtype=dtype, card=card)
        case "lora":
            write_lora(out, lora, source, dtype=dtype, card=card)
        case "torch":
            write_dict(out, source, plan_tensors(source, dtype))
    step = reader.found.entry.step
    turned = f"{out}: of rotary positions with time={rope.time} factor={rope.factor:g}; who loads it must turn likewise"
    return [
        *held.notes,
        *([] if rope.time == "none" else [turned]),
        f"{out}: {request.format}, {request.dtype}, {request.weights} weights of step {step} of {held.name}",
    ]


def write_dict(file: Path, source: TensorSource, tensors: Sequence[Planned]) -> None:
    """Write a file that `torch.load` reads as a dict of tensors, part by part. Raises ValueError where it is there."""
    if file.exists() or file.is_symlink():
        raise ValueError(f"{file} is there already: name a new file, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    check_room(file.parent, total_bytes(tensors))
    keys = [f"{number:08}" for number in range(len(tensors))]  # in order, as torch sorts them
    held = {t.name: TensorOfRecord(key, t.shape, t.dtype) for t, key in zip(tensors, keys, strict=True)}
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", suffix=".partial", dir=file.parent) as folder:
        partial = Path(folder) / file.name
        with partial.open("xb") as stream:
            stream.write(file_head(held, keys))
            for tensor in tensors:
                stream.write(struct.pack("<q", prod(tensor.shape)))
                copy_tensor(source, tensor, stream)
        partial.replace(file)


def configs_of(reader: CheckpointReader) -> tuple[ModelConfig, LoraConfig]:
    """The configurations of a checkpoint's model and adapters. Raises ValueError where it has none."""
    stored = reader.found.manifest.config
    if "model" not in stored:
        raise ValueError(f"{reader.storage.url}/{reader.found.entry.folder} doesn't say what model it is of")
    return ModelConfig(**stored["model"]), LoraConfig(**stored.get("lora", {}))


def model_card(reader: CheckpointReader, source: TensorSource, request: ExportRequest, name: str) -> str:
    """A README for an export: what is known of it, and how to load it."""
    manifest, origin = reader.found.manifest, reader.found.manifest.origin
    count = sum(prod(shape) for shape in source.shapes().values())
    loads = {
        "diffusers": "from diffusers import WanTransformer3DModel\n\n"
        f'model = WanTransformer3DModel.from_pretrained("{name}")',
        "lora": f'pipeline.load_lora_weights("{name}")  # a diffusers WanPipeline',
        "torch": f'import torch\n\nweights = torch.load("{name}", weights_only=True)',
    }
    rows = {
        "architecture": "WanTransformer3DModel (diffusers)",
        "parameters": f"{count:,}",
        "weights": "exponential moving average" if request.weights == "ema" else "as trained",
        "dtype": request.dtype,
        "adapters": "merged" if request.merge else "none" if request.format == "diffusers" else "as they are",
        "step": str(manifest.progress.step),
        "samples seen": f"{manifest.progress.samples:,}",
        "recipe": origin.recipe or "unknown",
        "descends from": ", ".join(origin.parents) or "nothing: trained from initial weights",
        "trained with": ", ".join(f"{package} {version}" for package, version in origin.versions.items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\nlibrary_name: {'diffusers' if request.format != 'torch' else 'torch'}\n---\n\n# {name}\n\n"
        f"Exported by cuboid.\n\n| | |\n|---|---|\n{table}\n\n```python\n{loads[request.format]}\n```\n"
    )


def import_weights(place: str, store: str) -> list[str]:
    """Make a checkpoint of step 0 of a directory saved by diffusers, in a store that has none. Returns lines to print.

    A run takes it by `init_from`, `export` gives it back. Raises ValueError.
    """
    source, storage = DiffusersSource(place), open_storage(store)
    check_complete(source.config, source)
    storage.check()
    if storage.list("step-"):
        raise ValueError(f"{store} has checkpoints already: name a place of its own")
    own(storage, uuid.uuid4().hex, f"the weights of {source.name}")
    fence = claim(storage, first=0)
    fence.begin(0)
    entry, shapes = Entry(0, fence.attempt), source.shapes()
    ranges = [Range(ParameterShard.whole(name, shape), 0, prod(shape)) for name, shape in shapes.items()]
    layout = lay_out("model-00000.distcp", "model", ranges, torch.float32)
    parts = (read_whole(source, name).view(-1) for name in shapes)
    files = {layout.name: write_boxes(storage, f"{entry.folder}/{layout.name}", layout, parts)}
    tensors = {keyed.key: StoredTensor(keyed.shape, torch.float32, (keyed.box,)) for keyed in layout.boxes}
    files[METADATA] = put_checksummed(storage, f"{entry.folder}/{METADATA}", encode_metadata(tensors))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    origin = Origin(attempt=fence.attempt, versions=versions(), created=created, parents=(source.name,))
    manifest = Manifest(Progress(), origin, files, {"model": asdict(source.config)})
    storage.put(f"{entry.folder}/{MANIFEST}", encode_manifest(manifest))
    size = sum(prod(shape) for shape in shapes.values())
    line = f"{storage.url}/{entry.folder}: {len(shapes)} tensors, {size:,} parameters of {source.name}"
    return [*source.notes, line]


@dataclass(frozen=True)
class Difference:
    """A tensor that isn't the same in two checkpoints, and how."""

    key: str
    what: str


def compare(a: str, b: str) -> tuple[int, list[Difference]]:
    """Number of tensors in both, and what differs, bit by bit."""
    readers = [CheckpointReader(*open_checkpoint(place)) for place in (a, b)]
    first, second = (reader.tensors for reader in readers)
    found = [Difference(key, f"only in {a}") for key in sorted(first.keys() - second.keys())]
    found += [Difference(key, f"only in {b}") for key in sorted(second.keys() - first.keys())]
    both = sorted(first.keys() & second.keys())
    for key in both:
        if (first[key].shape, first[key].dtype) != (second[key].shape, second[key].dtype):
            found.append(
                Difference(key, f"{first[key].dtype} {first[key].shape} / {second[key].dtype} {second[key].shape}")
            )
            continue
        left, right = (reader.whole(key) for reader in readers)
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            largest = float((left.double() - right.double()).abs().max())
            found.append(Difference(key, f"differs by up to {largest:.3g}"))
    return len(both), found
