"""Descriptions of hardware: those that come along, and what is refused."""

import tomllib
from pathlib import Path

import pytest
import yaml
from described import leaf, tree
from syntax import REPOSITORY

from framework.plan.hardware import FOLDER, hardware_names, load_hardware, rate

CASES = [
    ({"device__memory": None}, r"device.memory is missing: bytes that a process can allocate"),
    ({"network__across__hop": None}, r"network.across.hop.\* is missing: seconds more for each step"),
    ({"device__attention__aten__backward": None}, r"device.attention.\*.backward is missing"),
    ({"device__attention__cudnn": {"forward": leaf(1)}}, r"device.attention.cudnn.backward is missing"),
    ({"device__memroy": 1.0}, r"device.memroy is unknown; did you mean device.memory\?"),
    ({"device__launch": -1.0}, r"device.launch is -1.0: it must be a number above 0 \(seconds of the host"),
    ({"device__bandwidth": 0}, r"device.bandwidth is 0: it must be a number above 0"),
    ({"device__headroom": 0.9}, r"device.headroom is 0.9: it must be a number at least 1"),
    ({"device__memory": leaf(True)}, r"device.memory is True: it must be a number"),
    ({"device__memory": leaf("much")}, r"device.memory is 'much': it must be a number"),
    ({"device__memory": leaf(float("nan"))}, r"device.memory is nan: it must be a number"),
    ({"device__memory": {"value": 1}}, r"device.memory must have a value and a source"),
    ({"device__memory": {"value": 1, "source": ""}}, r"device.memory must have a value and a source"),
    ({"network__overlap": 1.5}, r"network.overlap is 1.5: a share, at most 1"),
    ({"network__skew": -0.1}, r"network.skew is -0.1: it must be a number at least 0"),
    ({"network__skew": 0.1}, r"network.skew and network.stretch are measured together"),
    ({"network__stretch": 0}, r"network.stretch is 0: it must be a number above 0"),
    ({"device__kind": "tpu"}, r"device.kind must be gpu or cpu, not 'tpu'"),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_what_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    with pytest.raises(ValueError, match=f"mine.yaml: {message}"):
        load_hardware(str(path))


def test_a_bare_number_has_no_source(tmp_path: Path) -> None:
    path, plain = tmp_path / "mine.yaml", tree()
    plain["device"]["launch"] = 1.0
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(ValueError, match=r"device.launch must be \{value: ..., source: ...\}, not 1.0"):
        load_hardware(str(path))


def test_a_name_that_isnt_there_is_answered_by_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"a100, b200, cpu, h100, h200; did you mean h100\?"):
        load_hardware("h1000")


def test_those_that_come_along_are_packaged_and_read() -> None:
    found = {name: load_hardware(name) for name in hardware_names()}
    assert found.keys() == {"a100", "h100", "h200", "b200", "cpu"}
    # 79.1, 139.8 and 178 GiB
    assert [round(found[name].device.memory / 2**30, 1) for name in ("h100", "h200", "b200")] == [79.1, 139.8, 178.0]
    h100 = found["h100"]
    assert h100.device.matmul["bfloat16"] == 794.5e12 and h100.network.domain == 8
    assert h100.device.attention["cudnn"].forward == 618e12 and h100.device.attention["cudnn"].backward == 534e12
    # Ranks that drift apart were measured on CPUs alone.
    assert (h100.network.skew, found["cpu"].network.skew > 0, found["cpu"].network.stretch > 0) == (0, True, True)
    assert "device.launch" in h100.assumed and "device.matmul.bfloat16" not in h100.assumed
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert set(FOLDER.parent.glob(data["framework.plan"][0])) == set(FOLDER.glob("*.yaml")) != set()


def test_a_table_falls_back_on_its_default_alone() -> None:
    assert rate({"default": 1.0, "ring": 2.0}, "ring", "x") == 2.0
    assert rate({"default": 1.0, "ring": 2.0}, "all_gather", "x") == 1.0
    with pytest.raises(ValueError, match=r"device.matmul.float64 isn't described for this hardware, only float32"):
        rate({"float32": 1.0}, "float64", "device.matmul")
