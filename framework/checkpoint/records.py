"""The files of a checkpoint, as torch's distributed checkpoint (DCP) lays them out.

A file is a row of records, one for each box of a tensor; `.metadata` is a pickled `Metadata` that says which box lies
where. A record is what `torch.load` reads: a head of about 300 bytes, then the box's elements as they lie in memory:

    magic | protocol | system | tensor (storage "0", shape, strides) | ["0"] | number of elements | elements

That is torch's older format (`torch.save(..., _use_new_zipfile_serialization=False)`). Its elements come last, so they
are found without a look at the head, at any place inside; and the head depends on dtype and shape alone, so that a
file's layout is known before anything is written. The newer format is a zip archive: 1,570 bytes a box, the elements in
its middle (measured with torch 2.14).

A pickle can run code. `.metadata` is read through a list of the few classes it needs; anything else is refused by name.
"""

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from framework.checkpoint.manifest import DamagedCheckpoint

Sizes = tuple[int, ...]

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES: Final[Mapping[torch.dtype, type]] = MappingProxyType(
    {
        torch.float32: torch.FloatStorage,
        torch.float64: torch.DoubleStorage,
        torch.bfloat16: torch.BFloat16Storage,
        torch.float16: torch.HalfStorage,
    }
)
METADATA_CLASSES: Final = frozenset(
    {
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch", "float32"),
        ("torch", "float64"),
        ("torch", "bfloat16"),
        ("torch", "float16"),
    }
)


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor in a file. start: byte at which its elements begin."""

    offset: Sizes
    sizes: Sizes
    file: str
    start: int

    @property
    def num_elements(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: global shape, dtype and the boxes that make it up."""

    shape: Sizes
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class StorageOfRecord:
    """Stands for a storage while a head is pickled."""

    key: str
    dtype: torch.dtype
    num_elements: int


class HeadPickler(pickle.Pickler):
    """Pickles tensors with their storages by reference, as `torch.save` does."""

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        if not isinstance(obj, StorageOfRecord):
            return None
        return ("storage", STORAGES[obj.dtype], obj.key, "cpu", obj.num_elements, None)


class TensorOfRecord:
    """Pickles as the tensor that `torch.load` rebuilds on a storage."""

    def __init__(self, key: str, sizes: Sizes, dtype: torch.dtype) -> None:
        self._sizes, self._storage = sizes, StorageOfRecord(key, dtype, prod(sizes))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        strides = tuple(prod(self._sizes[dim + 1 :]) for dim in range(len(self._sizes)))
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (self._storage, 0, self._sizes, strides, False, OrderedDict())


def file_head(value: object, keys: list[str]) -> bytes:
    """What stands before the storages of a file that `torch.load` reads. value: holds `TensorOfRecord`s."""
    stream = io.BytesIO()
    system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    for each in (MAGIC, PROTOCOL, system):
        pickle.dump(each, stream, protocol=2)
    HeadPickler(stream, protocol=2).dump(value)
    pickle.dump(keys, stream, protocol=2)
    return stream.getvalue()


def record_head(sizes: Sizes, dtype: torch.dtype) -> bytes:
    """What stands before the elements of a box."""
    return file_head(TensorOfRecord("0", sizes, dtype), ["0"]) + struct.pack("<q", prod(sizes))


def encode_metadata(tensors: Mapping[str, StoredTensor]) -> bytes:
    """DCP's `.metadata` of some tensors."""
    listed: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places = {}
    for key, tensor in tensors.items():
        chunks = []
        for index, box in enumerate(tensor.boxes):
            offset, sizes = torch.Size(box.offset), torch.Size(box.sizes)
            chunks.append(ChunkStorageMetadata(offset, sizes))
            head = len(record_head(box.sizes, tensor.dtype))
            length = head + box.num_elements * tensor.dtype.itemsize
            places[MetadataIndex(key, offset, index)] = _StorageInfo(box.file, box.start - head, length)
        properties = TensorProperties(dtype=tensor.dtype)
        listed[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    return pickle.dumps(Metadata(listed, storage_data=places, storage_meta=StorageMeta()), protocol=4)


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` without running anything that it names."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(io.BytesIO(data))
        self._name = name

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in METADATA_CLASSES:
            raise DamagedCheckpoint(
                f"{self._name} names {module}.{name}, which no checkpoint needs and which may run code: refused, and "
                "nothing of it was run; don't trust where this checkpoint comes from"
            )
        return super().find_class(module, name)


def decode_metadata(data: bytes, name: str) -> dict[str, StoredTensor]:
    """The tensors of a `.metadata`. Raises DamagedCheckpoint where it isn't what `encode_metadata` makes."""
    try:
        metadata = MetadataUnpickler(data, name).load()
        places: dict[tuple[str, Sizes], _StorageInfo] = {
            (index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items()
        }
        tensors = {}
        for key, stored in metadata.state_dict_metadata.items():
            dtype, boxes = stored.properties.dtype, []
            for chunk in stored.chunks:
                offset, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
                info = places[key, offset]
                start = info.offset + info.length - prod(sizes) * dtype.itemsize
                boxes.append(StoredBox(offset, sizes, info.relative_path, start))
            tensors[key] = StoredTensor(tuple(stored.size), dtype, tuple(boxes))
    except DamagedCheckpoint:
        raise
    except Exception as error:  # an unpickler raises anything
        raise DamagedCheckpoint(f"{name} can't be read: {type(error).__name__}: {error}") from error
    return tensors


def check_cover(key: str, tensor: StoredTensor) -> None:
    """Raises ValueError unless the boxes cover the tensor exactly once."""
    rows = (len(tensor.boxes), len(tensor.shape))
    offsets = np.array([box.offset for box in tensor.boxes], dtype=np.int64).reshape(rows)
    sizes = np.array([box.sizes for box in tensor.boxes], dtype=np.int64).reshape(rows)
    ends, shape = offsets + sizes, np.array(tensor.shape, dtype=np.int64)
    covered = int(sizes.prod(axis=1).sum())
    if (offsets < 0).any() or (ends > shape).any() or covered != prod(tensor.shape):
        raise ValueError(f"{key} of shape {tensor.shape}: its boxes hold {covered} of {prod(tensor.shape)} elements")
    if overlaps(offsets, ends):
        raise ValueError(f"{key} of shape {tensor.shape}: two of its boxes overlap")


def overlaps(offsets: np.ndarray, ends: np.ndarray) -> bool:
    """Whether two of some boxes (`n d` each) share an element: those that begin before another one's end in dimension
    0, as a sorted sweep sees them, are compared in the others.
    """
    if offsets.shape[1] == 0:
        return len(offsets) > 1
    order = np.argsort(offsets[:, 0], kind="stable")
    offsets, ends = offsets[order], ends[order]
    after = np.searchsorted(offsets[:, 0], ends[:, 0], side="left")
    for index in np.flatnonzero(after > np.arange(len(offsets)) + 1):
        others = slice(index + 1, after[index])
        if ((offsets[others] < ends[index]) & (ends[others] > offsets[index])).all(axis=1).any():
            return True
    return False
