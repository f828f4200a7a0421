"""Weights of the Wan transformer in diffusers' layout: a directory with `config.json` and safetensors.

Names and shapes are the model's own, so nothing is renamed or converted. Two layouts exist (diffusers
`save_pretrained`, `max_shard_size`): one file, or several with an index that says which file holds which tensor. A
pipeline's directory has one such directory a part: `transformer`, and for Wan 2.2's second expert `transformer_2`.

Only safetensors are read: the other formats are pickles, which can run code.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.models.config import ModelConfig

CLASS_NAME = "WanTransformer3DModel"
CONFIG = "config.json"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = ("F64", "F32", "BF16", "F16")
# Wan 2.1's image-to-video files hold a norm of the image's queries that no forward uses; diffusers skips it too.
UNUSED = "norm_added_q"


class TensorSource(Protocol):
    """Named tensors of a model, wherever they are stored. name: what a message calls the place."""

    name: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The global shape of every tensor, by its parameter's name."""
        ...

    def read(self, name: str, offset: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` with the box of its shape at `offset` of the global tensor, cast to its dtype."""
        ...


class DiffusersSource:
    """`TensorSource` of a directory saved by diffusers; reads the slices that are asked for."""

    def __init__(self, place: str) -> None:
        """place: DIR, or DIR:transformer_2 for a part of a pipeline. Raises ValueError for what can't be read whole."""
        self._folder = find_folder(place)
        self.name = str(self._folder)
        self.config = _read_config(self._folder / CONFIG)
        self._files = find_tensors(self._folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            with opened(file) as stored:
                held = [name for name, where in self._files.items() if where == file]
                absent = sorted(set(held) - set(stored.keys()))
                if absent:
                    raise ValueError(f"{file} lacks {absent[0]}, which {INDEX} says is there")
                for name in held:
                    part = stored.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(
                            f"{file}: {name} has the dtype {part.get_dtype()}, not one of {', '.join(DTYPES)}"
                        )
                    self._shapes[name] = tuple(part.get_shape())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, offset: tuple[int, ...], out: Tensor) -> None:
        with opened(self._files[name]) as stored:
            box = tuple(slice(first, first + size) for first, size in zip(offset, out.shape, strict=True))
            out.copy_(stored.get_slice(name)[box] if box else stored.get_tensor(name))


def is_diffusers(place: str) -> bool:
    """Whether a word names a directory that diffusers may have saved."""
    if "://" in place:
        return False
    folder, _, part = place.partition(":")
    path = Path(folder) / part if part else Path(folder)
    return any((each / CONFIG).is_file() for each in (path, path / "transformer")) or bool(part and path.is_dir())


def find_folder(place: str) -> Path:
    """The directory with the transformer's config.json. Raises ValueError."""
    folder, _, part = place.partition(":")
    path = Path(folder) / part if part else Path(folder)
    if not (path / CONFIG).is_file() and (path / "transformer" / CONFIG).is_file():
        path = path / "transformer"
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} is no directory saved by diffusers: it lacks {CONFIG}")
    return path


def find_tensors(folder: Path) -> dict[str, Path]:
    """Parameter name -> file. Raises ValueError for missing and misplaced files, and where there are pickles only."""
    index = folder / INDEX
    if not index.is_file() and not (folder / SINGLE).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has {pickles[0]} and no safetensors: a pickle can run code and isn't read; save the model "
                "again with safe_serialization=True where you trust it"
            )
        raise ValueError(f"{folder} lacks {SINGLE}, and {INDEX} too")
    if not index.is_file():
        with opened(folder / SINGLE) as stored:
            names = dict.fromkeys(stored.keys(), SINGLE)
    else:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map: it doesn't say where a tensor lies")
        names = {str(name): str(file) for name, file in weight_map.items()}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file}, which lies outside its directory")
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks {file}, which {INDEX} names")
    return {name: folder / file for name, file in names.items() if UNUSED not in name}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file. Raises ValueError naming it where it is damaged."""
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{file} can't be read, it may be truncated: {error}") from error


def _read_config(file: Path) -> ModelConfig:
    stored = _read_json(file)
    if (name := stored.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise ValueError(f"{file}: holds a {name}, and only a {CLASS_NAME} can be read")
    values = {key: value for key, value in stored.items() if not key.startswith("_")}
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; a {CLASS_NAME} has {', '.join(sorted(known))}")
    try:
        return ModelConfig(**values)
    except TypeError as error:
        raise ValueError(f"{file}: a value has the wrong type: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content
