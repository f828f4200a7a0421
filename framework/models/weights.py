"""Weights of the Wan transformer in diffusers' layout: a directory with `config.json` and safetensors.

Names and shapes are the model's own, so nothing is renamed or converted. Two layouts exist (diffusers
`save_pretrained`, `max_shard_size`): one file, or several with an index that says which file holds which tensor.
Files are read one tensor at a time: the largest tensor is what has to fit in memory.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.models.config import ModelConfig

CLASS_NAME = "WanTransformer3DModel"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
# Wan 2.1's image-to-video files hold a norm of the image's queries that no forward uses; diffusers skips it too.
UNUSED = "norm_added_q"


def load_diffusers(directory: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The configuration, and (name, tensor) for every tensor, on the CPU and in the stored dtype.

    Whether the names are complete is for the reader of the iterator to check. `norm_added_q` is left out (see above).
    ValueError for a directory of another class, an unknown configuration key, or a file that is missing or damaged;
    the files' content is checked when the iterator gets there.
    """
    config = _read_config(directory / "config.json")
    index = directory / INDEX
    if index.is_file():
        files = sorted({directory / name for name in _read_json(index)["weight_map"].values()})
    else:
        files = [directory / SINGLE]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{directory} lacks {', '.join(missing)}: expected {SINGLE}, or the files named in {INDEX}")
    return config, _read_tensors(files)


def _read_config(file: Path) -> ModelConfig:
    if not file.is_file():
        raise ValueError(f"{file.parent} is no directory saved by diffusers: it lacks {file.name}")
    stored = _read_json(file)
    if (name := stored.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise ValueError(f"{file}: holds a {name}, and only a {CLASS_NAME} can be read")
    values = {key: value for key, value in stored.items() if not key.startswith("_")}
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; a {CLASS_NAME} has {', '.join(sorted(known))}")
    return ModelConfig(**values)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    return content


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as stored:
                for name in stored.keys():  # noqa: SIM118  (not a dict)
                    if UNUSED not in name:
                        yield name, stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} can't be read, it may be truncated: {error}") from error
