"""Weights of the Wan transformer in diffusers' layout: a directory with `config.json` and safetensors.

Names and shapes are the model's own, so nothing is renamed or converted. Two layouts exist (diffusers
`save_pretrained`, `max_shard_size`): one file, or several with an index that says which file holds which tensor. Only
the bytes of the box that is asked for are read.

A safetensors file is 8 bytes with the length of its header, the header as JSON (dtype, shape and range of bytes of each
tensor), and the tensors as they lie in memory. A pickle (`.bin`, `.pt`) can run code when it is read, and never is.
"""

import itertools
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.models.config import ModelConfig
from framework.models.saved import CONFIG, find_directory
from framework.models.source import Sizes, parts_of

CLASS_NAME = "WanTransformer3DModel"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Wan 2.1's image-to-video files hold a norm of the image's queries that no forward uses; diffusers skips it too.
UNUSED = "norm_added_q"
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
)
CAST_ELEMENTS = 4 << 20  # read at a time where they can't go straight to their place


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. start: its first byte there."""

    file: Path
    dtype: torch.dtype
    shape: Sizes
    start: int


class DiffusersSource:
    """`TensorSource` of a directory that `save_pretrained` could have written; headers are read when it is made.

    config: of the model. notes: what a person should know of the choice of the directory. bytes_read: of tensors.
    """

    def __init__(self, place: str) -> None:
        """place: DIR or DIR:SUBFOLDER. DIR may be a pipeline's: without a subfolder that is its `transformer`.

        `norm_added_q` is left out (see above). Raises ValueError for a directory of another class, an unknown
        configuration key, pickles in the place of safetensors, or a file that is missing, damaged or elsewhere.
        """
        directory, self.notes = find_directory(place)
        self.name, self.config, self.bytes_read = str(directory), read_config(directory / CONFIG), 0
        tensors: dict[str, StoredTensor] = {}
        for file, names in files_of(directory).items():
            found = read_header(file)
            if missing := sorted(names - found.keys()):
                raise ValueError(f"{file} lacks {missing[0]}, which {directory / INDEX} says it holds")
            if twice := sorted(found.keys() & tensors.keys()):
                raise ValueError(f"{file} holds {twice[0]}, and {tensors[twice[0]].file} does too: one is stale")
            tensors |= found
        self._tensors = {name: tensor for name, tensor in tensors.items() if UNUSED not in name}

    def shapes(self) -> Mapping[str, Sizes]:
        """Global shapes by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, offset: Sizes, out: Tensor) -> None:
        """Fill `out` with the box at `offset`. Raises ValueError where the file has become shorter."""
        stored = self._tensors[name]
        assert len(offset) == out.dim() == len(stored.shape), (name, offset, out.shape, stored.shape)
        assert all(o >= 0 and o + n <= m for o, n, m in zip(offset, out.shape, stored.shape, strict=True)), name
        if out.numel() == 0:
            return
        with stored.file.open("rb", buffering=0) as file:
            if out.dtype == stored.dtype and out.device.type == "cpu" and out.is_contiguous():
                self._read_box(file.fileno(), stored, offset, out)
                return
            for first, sizes in parts_of(tuple(out.shape), CAST_ELEMENTS):
                part = torch.empty(sizes, dtype=stored.dtype)
                self._read_box(file.fileno(), stored, tuple(a + b for a, b in zip(offset, first, strict=True)), part)
                view = out.narrow(0, first[0], sizes[0]) if sizes else out
                view.copy_(part)

    def _read_box(self, file: int, stored: StoredTensor, offset: Sizes, out: Tensor) -> None:
        flat = out.detach().as_strided((out.numel(),), (1,))  # a single element may have any stride
        data, position = flat.view(torch.uint8).numpy().data, 0
        size = stored.dtype.itemsize
        for start, run in runs_of(stored.shape, offset, tuple(out.shape)):
            begin, rest = stored.start + start * size, data[position : position + run * size]
            while rest:
                got = os.preadv(file, [rest], begin)
                if got == 0:
                    raise ValueError(f"{stored.file} has become shorter while it was read: it ends at byte {begin}")
                begin, rest = begin + got, rest[got:]
            position += run * size
        assert position == len(data), (stored, offset, out.shape)
        self.bytes_read += position


def runs_of(shape: Sizes, offset: Sizes, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of the contiguous runs that a box has in a row-major tensor, in order."""
    dim, run = len(sizes), 1
    while dim:
        dim -= 1
        run *= sizes[dim]
        if sizes[dim] != shape[dim]:
            break
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    base = sum(o * s for o, s in zip(offset, strides, strict=True))
    for outer in itertools.product(*(range(n) for n in sizes[:dim])):
        yield base + sum(i * s for i, s in zip(outer, strides[:dim], strict=True)), run


def read_config(file: Path) -> ModelConfig:
    """The model's configuration. Raises ValueError, see `DiffusersSource`."""
    if not file.is_file():
        raise ValueError(f"{file.parent} is no directory saved by diffusers: it lacks {file.name}")
    stored = read_json(file)
    if (name := stored.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise ValueError(f"{file}: holds a {name}, and only a {CLASS_NAME} can be read")
    values = {key: value for key, value in stored.items() if not key.startswith("_")}
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; a {CLASS_NAME} has {', '.join(sorted(known))}")
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def files_of(directory: Path) -> dict[Path, set[str]]:
    """The files of weights, and what the index says of each."""
    index, files = directory / INDEX, {directory / SINGLE: set[str]()}
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{index} has no weight_map of tensors to files")
        files = {}
        for tensor, name in sorted(listed.items()):
            if name != Path(name).name or name in ("", ".."):
                raise ValueError(f"{index} names {name!r}, which isn't a file of its own directory")
            files.setdefault(directory / name, set()).add(tensor)
    missing = sorted(file.name for file in files if not file.is_file())
    if not missing:
        return files
    there = sorted(file.name for file in directory.iterdir() if file.suffix in (*PICKLES, ".safetensors"))
    if there and all(name.endswith(PICKLES) for name in there):
        raise ValueError(
            f"{directory} holds its weights as {', '.join(there)} only: a pickle, which can run code when it is read, "
            "so it isn't; where you trust it, load it with diffusers and write it anew with "
            "save_pretrained(DIR, safe_serialization=True)"
        )
    others = f"; it holds {', '.join(there)}" if there else ""
    raise ValueError(
        f"{directory} lacks {', '.join(missing)}: expected {SINGLE}, or the files named in {INDEX}{others}"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. The library checks the header: the ranges of bytes cover the file exactly."""
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} can't be read, it may be truncated: {error}") from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{file}: {name} is stored as {entry['dtype']}, and weights are read from {known}")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors
