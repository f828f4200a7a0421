"""Writing a model's weights for others, part by part: what is in memory is a part of a tensor.

* diffusers: a directory as its `save_pretrained` makes it: safetensors in several files with an index, `config.json`.
* LoRA: `pytorch_lora_weights.safetensors` with PEFT's names, as diffusers' `load_lora_weights` reads it.
* torch: one file that `torch.load(weights_only=True)` reads as a dict (checkpoint/interchange.py).

A safetensors file is 8 bytes with the length of its header, the header in JSON (dtype, shape and place of each tensor),
and the tensors' bytes: as the shapes are known, the header is written first.

In bfloat16 the parameters that diffusers keeps in float32 (`KEPT_FLOAT32`) stay so, as in what it saves itself.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from framework.models.adapters import ADAPTER_FILE, adapters_of, file_metadata, file_name, merged
from framework.models.config import LoraConfig, ModelConfig, is_adapter
from framework.models.saved import CONFIG
from framework.models.source import Sizes, TensorSource, parts_of
from framework.models.weights import CLASS_NAME, INDEX, SINGLE
from framework.plan.parameters import parameter_shapes

DIFFUSERS_VERSION = "0.39.0"  # the release whose layout this is
SHARD_BYTES = 10 * 10**9  # of a file at most, diffusers' own default
NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType({torch.float32: "F32", torch.bfloat16: "BF16"})
# diffusers 0.39, `WanTransformer3DModel._keep_in_fp32_modules`: parts of names.
KEPT_FLOAT32: Final = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
PART_ELEMENTS = 8 << 20  # read and written at a time
SPARE_BYTES = 1 << 20  # on the disk, for what is written beside the tensors


class Merged:
    """`TensorSource` of a model whose adapters are added to their linears: W + (alpha / rank) B A, in float32."""

    def __init__(self, source: TensorSource, lora: LoraConfig) -> None:
        self.name, self._source, self._lora = source.name, source, lora
        self._pairs = adapters_of(source.shapes())

    def shapes(self) -> Mapping[str, Sizes]:
        return {name: shape for name, shape in self._source.shapes().items() if not is_adapter(name)}

    def read(self, name: str, offset: Sizes, out: Tensor) -> None:
        if name not in self._pairs:
            self._source.read(name, offset, out)
            return
        (row, column), (rows, columns), rank = offset, out.shape, self._lora.rank
        weight, lora_a, lora_b = torch.empty(rows, columns), torch.empty(rank, columns), torch.empty(rows, rank)
        name_a, name_b = self._pairs[name]
        self._source.read(name, offset, weight)
        self._source.read(name_a, (0, column), lora_a)
        self._source.read(name_b, (row, 0), lora_b)
        out.copy_(merged(weight, lora_a, lora_b, self._lora.scale))


def read_whole(source: TensorSource, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole tensor."""
    out = torch.empty(source.shapes()[name], dtype=dtype)
    source.read(name, (0,) * out.dim(), out)
    return out


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. name: in the file. origin: in the source."""

    name: str
    origin: str
    shape: Sizes
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: memoryview, /) -> Any:
        """Append."""
        ...


def plan_tensors(source: TensorSource, dtype: torch.dtype) -> list[Planned]:
    """What is to be written of a source."""
    return [
        Planned(name, name, tuple(shape), torch.float32 if KEPT_FLOAT32 & set(name.split(".")) else dtype)
        for name, shape in source.shapes().items()
    ]


def copy_tensor(source: TensorSource, tensor: Planned, sink: Sink) -> None:
    """Write a tensor's elements."""
    written = 0
    for offset, sizes in parts_of(tensor.shape, PART_ELEMENTS):
        part = torch.empty(sizes, dtype=tensor.dtype)
        source.read(tensor.origin, offset, part)
        data = part.view(-1).view(torch.uint8).numpy().data
        sink.write(data)
        written += len(data)
    assert written == tensor.num_bytes, (tensor, written)


def write_diffusers(
    out: Path,
    config: ModelConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    card: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make a directory for `WanTransformer3DModel.from_pretrained`. card: its README. Raises ValueError where `out` is
    there and isn't empty, the source isn't the whole model, or the disk has too little room.
    """
    check_complete(config, source)
    tensors = plan_tensors(source, dtype)
    files = split(tensors, shard_bytes)
    stem = SINGLE.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [SINGLE]

    def fill(folder: Path) -> None:
        for name, part in zip(names, files, strict=True):
            write_safetensors(folder / name, source, part, {"format": "pt"})
        if len(files) > 1:
            weight_map = {each.name: name for name, part in zip(names, files, strict=True) for each in part}
            index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        fields = {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION} | asdict(config)
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").write_text(card)

    make_directory(out, fill, total_bytes(tensors))


def write_lora(out: Path, lora: LoraConfig, source: TensorSource, *, dtype: torch.dtype, card: str) -> None:
    """Make a directory with the adapters alone. Raises ValueError where there are none, or `out` isn't empty."""
    every = plan_tensors(source, dtype)
    tensors = [Planned(file_name(t.name), t.name, t.shape, t.dtype) for t in every if is_adapter(t.name)]
    if not tensors:
        raise ValueError(f"{source.name} has no adapters (lora.rank=0): export it with --format diffusers or torch")

    def fill(folder: Path) -> None:
        write_safetensors(folder / ADAPTER_FILE, source, tensors, file_metadata(lora, source.shapes()))
        (folder / "README.md").write_text(card)

    make_directory(out, fill, total_bytes(tensors))


def check_complete(config: ModelConfig, source: TensorSource) -> None:
    """Raises ValueError unless a source has the model's parameters, and nothing else."""
    model = {parameter.name: parameter.shape for parameter in parameter_shapes(config)}
    stored = {name: tuple(shape) for name, shape in source.shapes().items()}
    for name in sorted(model.keys() | stored.keys()):
        if model.get(name) != stored.get(name):
            there = f"of shape {stored[name]}" if name in stored else "absent"
            here = f"of shape {model[name]}" if name in model else "no parameter"
            raise ValueError(f"{source.name} isn't the whole model: {name} is {there}, by the configuration {here}")


def make_directory(out: Path, fill: Callable[[Path], None], num_bytes: int) -> None:
    """Fill a directory beside `out` and put it in its place, so that it is there whole or not at all."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} is there already: name a new directory, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out.parent, num_bytes)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        fill(partial)
        partial.rename(out)  # over an empty directory too
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises ValueError where a disk can't hold what is to be written."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise ValueError(f"{folder} has room for {free / 1e9:.3g} GB, and {num_bytes / 1e9:.3g} GB are to be written")


def total_bytes(tensors: Sequence[Planned]) -> int:
    """Of the tensors alone."""
    return sum(tensor.num_bytes for tensor in tensors)


def split(tensors: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """The tensors in order, in files of at most `limit` bytes; one that is larger has a file of its own, before the one
    that is being filled (huggingface_hub's `split_state_dict_into_shards_factory`, so that the index is the same).
    """
    files: list[list[Planned]] = []
    current: list[Planned] = []
    size = 0
    for tensor in tensors:
        if tensor.num_bytes > limit:
            files.append([tensor])
            continue
        if size + tensor.num_bytes > limit:
            files.append(current)
            current, size = [], 0
        current.append(tensor)
        size += tensor.num_bytes
    return [*files, current] if current else files


def write_safetensors(
    file: Path, source: TensorSource, tensors: Sequence[Planned], metadata: Mapping[str, str]
) -> None:
    """Write tensors, those of larger elements first, so that each lies at a multiple of its elements' size."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        place = [end, end := end + tensor.num_bytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            copy_tensor(source, tensor, stream)
