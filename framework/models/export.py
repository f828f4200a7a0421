"""Writing a model's weights for others, one tensor at a time: what is in memory is the largest tensor.

* diffusers: a directory as its `save_pretrained` makes it: safetensors in several files with an index, `config.json`.
* LoRA: `pytorch_lora_weights.safetensors` with PEFT's names, as diffusers' `load_lora_weights` reads it.
* torch: one file that `torch.load(weights_only=True)` reads as a dict.

A safetensors file is 8 bytes with the length of its header, the header in JSON (dtype, shape and place of each tensor),
and the tensors' bytes: as the shapes are known, the header is written first.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from framework.models.adapters import ADAPTER_FILE, adapters_of, file_metadata, file_name, merged
from framework.models.config import LoraConfig, ModelConfig, is_adapter
from framework.models.source import TensorSource
from framework.models.weights import CLASS_NAME, CONFIG, INDEX, SINGLE

DIFFUSERS_VERSION = "0.39.0"  # the release whose layout this is
SHARD_BYTES = 10 << 30  # of a file at most, diffusers' own default
NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType({torch.float32: "F32", torch.bfloat16: "BF16"})


class Merged:
    """`TensorSource` of a model whose adapters are added to their linears: W + (alpha / rank) B A, in float32."""

    def __init__(self, source: TensorSource, lora: LoraConfig) -> None:
        self.name, self._source, self._lora = source.name, source, lora
        self._pairs = adapters_of(source.shapes())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, shape in self._source.shapes().items() if not is_adapter(name)}

    def read(self, name: str, offset: tuple[int, ...], out: Tensor) -> None:
        if name not in self._pairs:
            self._source.read(name, offset, out)
            return
        whole, lora_a, lora_b = (read_whole(self._source, each) for each in (name, *self._pairs[name]))
        box = tuple(slice(first, first + size) for first, size in zip(offset, out.shape, strict=True))
        out.copy_(merged(whole, lora_a, lora_b, self._lora.scale)[box])


def read_whole(source: TensorSource, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole tensor."""
    out = torch.empty(source.shapes()[name], dtype=dtype)
    source.read(name, (0,) * out.dim(), out)
    return out


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
    there and isn't empty.
    """
    shapes = {name: shape for name, shape in source.shapes().items() if not is_adapter(name)}
    files = split(shapes, dtype, shard_bytes)
    with_index = len(files) > 1
    stem = SINGLE.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] if with_index else [SINGLE]

    def fill(folder: Path) -> None:
        for name, part in zip(names, files, strict=True):
            write_safetensors(folder / name, part, dtype, lambda each: read_whole(source, each, dtype))
        if with_index:
            total = sum(prod(shape) * dtype.itemsize for shape in shapes.values())
            weight_map = {each: name for name, part in zip(names, files, strict=True) for each in part}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        fields = {"_class_name": CLASS_NAME, "_diffusers_version": DIFFUSERS_VERSION} | asdict(config)
        (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").write_text(card)

    make_directory(out, fill)


def write_lora(out: Path, lora: LoraConfig, source: TensorSource, *, dtype: torch.dtype, card: str) -> None:
    """Make a directory with the adapters alone. Raises ValueError where there are none, or `out` isn't empty."""
    held = source.shapes()
    original = {file_name(name): name for name in held if is_adapter(name)}
    if not original:
        raise ValueError(f"{source.name} has no adapters (lora.rank=0): export it with --format diffusers or torch")

    def fill(folder: Path) -> None:
        shapes = {name: held[own] for name, own in original.items()}
        write_safetensors(
            folder / ADAPTER_FILE,
            shapes,
            dtype,
            lambda name: read_whole(source, original[name], dtype),
            metadata=file_metadata(lora, held),
        )
        (folder / "README.md").write_text(card)

    make_directory(out, fill)


def make_directory(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a directory beside `out` and put it in its place, so that it is there whole or not at all."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a new directory, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def split(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, in files of at most `limit` bytes, but for a tensor that is larger alone."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        own = prod(shape) * dtype.itemsize
        if files[-1] and size + own > limit:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += own
    return files


def write_safetensors(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write tensors of one dtype. read: gives each, whole."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    place = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = read(name)
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shapes[name]), name
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
