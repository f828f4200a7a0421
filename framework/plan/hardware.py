"""What a machine can do, as data: one YAML file for each kind of machine, every number with its source.

    device:
      memory: {value: 84.9e9, source: "what torch reports on an H100 80GB"}

Numbers are what is *reached*, not what a data sheet promises; `device.peak` alone is the data sheet's, as MFU is
counted against it. A source that begins with "assumed" says that nobody has read or measured the number. `cuboid plan
--calibrate` writes such a file for the machine that it runs on (programs/calibrate.py).

Units: bytes, seconds, FLOP/s, bytes/s, USD.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import yaml

from framework.layers import StrictLoader

FOLDER: Final = Path(__file__).parent / "hardware"
OTHER: Final = "default"  # the entry of a table for every key that it hasn't
ASSUMED: Final = "assumed"

Table = Mapping[str, float]
Kind = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Entry:
    """A number of a description. name: `*` stands for a key of a table. least: what it must be at least; it must be
    above 0 where that is None.
    """

    name: str
    meaning: str
    least: float | None = None
    required: bool = True


SCHEMA: Final = (
    Entry("device.memory", "bytes that a process can allocate on the device"),
    Entry("device.context", "bytes of them that the driver and the libraries take for a process", least=0),
    Entry("device.communicator", "bytes of a communicator, for each process group", least=0),
    Entry("device.headroom", "bytes that the allocator reserves for each byte that is allocated", least=1),
    Entry("device.peak.*", "FLOP/s of the data sheet by dtype, dense, which MFU is counted against", required=False),
    Entry("device.matmul.*", "FLOP/s that large matrix products reach, by dtype"),
    Entry("device.attention.*.forward", "FLOP/s that an attention kernel's forward reaches, by kernel"),
    Entry("device.attention.*.backward", "FLOP/s of its backward, counted as 2.5 times the forward's FLOPs"),
    Entry("device.bandwidth", "bytes/s that elementwise operations read and write of the device's memory"),
    Entry("device.update", "bytes/s that the optimizer's update and copies of gradients read and write"),
    Entry("device.host_bandwidth", "bytes/s from host memory to the device, one way"),
    Entry("device.host_memory", "bytes/s that one rank reads and writes of host memory"),
    Entry("device.launch", "seconds of the host for a kernel"),
    Entry("device.step", "seconds of the host for an optimizer step, beside its kernels", least=0),
    Entry("device.shared", "ranks that the machine computes at full speed at once; more take turns", required=False),
    Entry("device.price", "USD for an hour of one device", least=0),
    Entry("network.domain", "devices of a link domain (NVLink), which are neighbours in rank order", least=1),
    Entry("network.inside.bandwidth.*", "bytes/s that a rank sends in a domain, by collective, or `default`"),
    Entry("network.inside.latency.*", "seconds of a collective in a domain, however few bytes"),
    Entry("network.inside.hop.*", "seconds more for each step from rank to rank"),
    Entry("network.across.bandwidth.*", "bytes/s that a rank sends to another domain"),
    Entry("network.across.latency.*", "seconds of a collective between domains, however few bytes"),
    Entry("network.across.hop.*", "seconds more for each step from domain to domain"),
    Entry("network.overlap", "share of hideable traffic that hides behind computing, 0 to 1", least=0),
    Entry("network.skew", "of the time computed, what ranks wait for the slowest of them", least=0, required=False),
    Entry("network.stretch", "seconds of computing between two exchanges, where skew was measured", required=False),
)


@dataclass(frozen=True)
class Attention:
    """FLOP/s of a kernel; the backward is counted as 2.5 times the FLOPs of the forward, as it is by flash-attn."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Device:
    """See SCHEMA. shared: None where every rank has a device of its own."""

    kind: Kind
    memory: float
    context: float
    communicator: float
    headroom: float
    peak: Table
    matmul: Table
    attention: Mapping[str, Attention]
    bandwidth: float
    update: float
    host_bandwidth: float
    host_memory: float
    launch: float
    step: float
    shared: float | None
    price: float


@dataclass(frozen=True)
class Link:
    """Bytes/s and seconds by kind of collective: all_gather, reduce_scatter, all_reduce, all_to_all, ring, reduce."""

    bandwidth: Table
    latency: Table
    hop: Table


@dataclass(frozen=True)
class Network:
    """Links inside a domain of so many ranks, and across domains."""

    domain: int
    inside: Link
    across: Link
    overlap: float
    skew: float
    stretch: float


@dataclass(frozen=True)
class Hardware:
    """A kind of machine. sources: where each number is from, by its dotted name."""

    name: str
    device: Device
    network: Network
    sources: Mapping[str, str]

    @property
    def assumed(self) -> tuple[str, ...]:
        """The numbers that nobody has read or measured."""
        return tuple(name for name, source in self.sources.items() if source.startswith(ASSUMED))


def hardware_names() -> list[str]:
    """The machines that are described here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def gpu_of(name: str) -> str:
    """The description of a GPU that its driver calls so (NVIDIA H100 80GB HBM3), "" where there is none."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((each for each in hardware_names() if each in words), "")


def load_hardware(name_or_path: str) -> Hardware:
    """A description by its name here (h100), or from a file. Raises ValueError with the file, the key and the fix."""
    path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, hardware_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"no such hardware: {name_or_path!r} is neither a file nor one of {', '.join(hardware_names())}{hint}; "
            "`cuboid plan --calibrate --out FILE` describes this machine"
        )
    try:
        tree = yaml.load(path.read_text(), Loader=StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} isn't valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, as {FOLDER / 'h100.yaml'} does")
    return read_hardware(tree, path)


def read_hardware(tree: dict[str, Any], path: Path) -> Hardware:
    """From a plain tree. path: of the file, for messages."""
    device_tree = tree.get("device")
    kind = device_tree.get("kind") if isinstance(device_tree, dict) else None
    if kind not in ("gpu", "cpu"):
        raise ValueError(f"{path}: device.kind must be gpu or cpu, not {kind!r}: whether the host runs ahead of it")
    leaves = dict(flatten(tree, "", path))
    values: dict[str, float] = {}
    for name, leaf in leaves.items():
        entry = next((entry for entry in SCHEMA if fnmatchcase(name, entry.name)), None)
        if entry is None:
            raise ValueError(f"{path}: {name} is unknown{suggestion(name)}")
        values[name] = number(leaf["value"], entry, name, path)
    for entry in SCHEMA:
        if entry.required and not any(fnmatchcase(name, entry.name) for name in values):
            raise ValueError(f"{path}: {entry.name} is missing: {entry.meaning}")
    for kernel in table(values, "device.attention", deep=True):
        for way in ("forward", "backward"):
            if f"device.attention.{kernel}.{way}" not in values:
                raise ValueError(f"{path}: device.attention.{kernel}.{way} is missing: FLOP/s of this kernel's {way}")
    if not values["network.domain"].is_integer():
        raise ValueError(f"{path}: network.domain is {values['network.domain']}: a number of devices")
    if values["network.overlap"] > 1:
        raise ValueError(f"{path}: network.overlap is {values['network.overlap']}: a share, at most 1")
    if ("network.skew" in values) != ("network.stretch" in values):
        raise ValueError(f"{path}: network.skew and network.stretch are measured together: give both or neither")
    sources = MappingProxyType({name: leaf["source"] for name, leaf in leaves.items()})
    return Hardware(path.stem, device_of(kind, values), network_of(values), sources)


def flatten(tree: dict[str, Any], above: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Dotted name -> {value, source} of every number."""
    found: list[tuple[str, dict[str, Any]]] = []
    for key, value in tree.items():
        name = f"{above}.{key}".lstrip(".")
        if name == "device.kind":
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be {{value: ..., source: ...}}, not {value!r}{suggestion(name)}")
        if "value" not in value:
            found += flatten(value, name, path)
        elif set(value) != {"value", "source"} or not isinstance(value["source"], str) or not value["source"]:
            raise ValueError(
                f"{path}: {name} must have a value and a source that says where it is from (or begins with "
                f"{ASSUMED!r}), it has {', '.join(map(str, value))}"
            )
        else:
            found.append((name, value))
    return found


def suggestion(name: str) -> str:
    """What may have been meant by an unknown name."""
    if any(fnmatchcase(name, entry.name) for entry in SCHEMA):
        return ""
    near = difflib.get_close_matches(name, [entry.name for entry in SCHEMA], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def number(value: object, entry: Entry, name: str, path: Path) -> float:
    """The value as a number that may stand there. YAML takes 1e9 without a sign in the exponent for a word."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    least = entry.least
    if not math.isfinite(found) or (found <= 0 if least is None else found < least):
        bound = "above 0" if least is None else f"at least {least:g}"
        raise ValueError(f"{path}: {name} is {value!r}: it must be a number {bound} ({entry.meaning})")
    return found


def table(values: dict[str, float], prefix: str, *, deep: bool = False) -> dict[str, float]:
    """The entries below a name, by their key."""
    below = {name[len(prefix) + 1 :]: value for name, value in values.items() if name.startswith(f"{prefix}.")}
    return {key.partition(".")[0]: value for key, value in below.items() if deep or "." not in key}


def device_of(kind: Kind, values: dict[str, float]) -> Device:
    """The device of checked values."""
    rates = {
        kernel: Attention(*(values[f"device.attention.{kernel}.{way}"] for way in ("forward", "backward")))
        for kernel in table(values, "device.attention", deep=True)
    }
    plain = ("memory", "context", "communicator", "headroom", "bandwidth", "update", "host_bandwidth", "host_memory")
    return Device(
        kind=kind,
        peak=MappingProxyType(table(values, "device.peak")),
        matmul=MappingProxyType(table(values, "device.matmul")),
        attention=MappingProxyType(rates),
        shared=values.get("device.shared"),
        **{name: values[f"device.{name}"] for name in (*plain, "launch", "step", "price")},
    )


def network_of(values: dict[str, float]) -> Network:
    """The network of checked values."""
    inside, across = (
        Link(*(MappingProxyType(table(values, f"network.{side}.{name}")) for name in ("bandwidth", "latency", "hop")))
        for side in ("inside", "across")
    )
    skew, stretch = values.get("network.skew", 0.0), values.get("network.stretch", 0.0)
    return Network(int(values["network.domain"]), inside, across, values["network.overlap"], skew, stretch)


def rate(rates: Table, key: str, name: str) -> float:
    """An entry of a table, or its default. Raises ValueError naming what there is."""
    found = rates.get(key, rates.get(OTHER))
    if found is None:
        raise ValueError(f"{name}.{key} isn't described for this hardware, only {', '.join(rates)}: add it to its file")
    return found
