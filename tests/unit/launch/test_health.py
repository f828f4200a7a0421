"""Health checks on real processes: nodes are pretended by their names, ranks talk by gloo."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from node_ranks import Break, check
from pool import run_ranks, run_until_killed

from framework.launch import health_ranks
from framework.launch.config import HealthConfig
from framework.launch.health import (
    NodeReport,
    compare_clocks,
    compare_networks,
    compare_stages,
    judge,
    read_reports,
    read_request,
    write_request,
)
from framework.launch.local import free_port
from framework.launch.node_checks import check_command, check_disk, check_memory, check_shm

pytestmark = pytest.mark.alone  # ranks, and waits are timed

FULL = HealthConfig(level="full", timeout=60, disk=0, shm=0, host=0)


def full(
    folder: Path, num_nodes: int, per_node: int, *, config: HealthConfig = FULL, broken: Break | None = None
) -> list[NodeReport]:
    """The reports of a check on pretended nodes."""
    names = [f"node{node}" for node in range(num_nodes)]
    write_request(folder, config, str(folder / "scratch"), time.time(), names)
    run_ranks(check, num_nodes * per_node, folder, per_node, broken)
    return read_reports(folder, names)


def bad(reports: list[NodeReport]) -> dict[str, tuple[str, ...]]:
    return {report.node: report.problems for report in judge(reports)}


def test_healthy_nodes_are_healthy(tmp_path: Path) -> None:
    reports = full(tmp_path, 2, 2)
    assert bad(reports) == {}
    for report in reports:
        assert (report.stage, report.ended, report.notes) == ("done", True, ())
        assert {"disk_gb", "tflops", "link_gbs", "network_gbs", "clock_s", "seconds"} <= report.numbers.keys()
        assert min(report.numbers[name] for name in ("tflops", "link_gbs", "network_gbs")) > 0


def test_three_nodes_exchange_with_their_neighbours(tmp_path: Path) -> None:
    reports = full(tmp_path, 3, 1, config=replace(FULL, network=1e9))
    assert bad(reports) == {}  # all are slow, so none is to blame
    assert all(report.numbers["pair_gbs"] > 0 and "below network=1e+09" in report.notes[0] for report in reports)


def test_one_rank_alone(tmp_path: Path) -> None:
    (report,) = full(tmp_path, 1, 1)
    assert (report.problems, report.notes, report.stage) == ((), (), "done")


@pytest.mark.parametrize("how", ["product", "nan"])
def test_a_wrong_product_is_named(tmp_path: Path, how: str) -> None:
    reports = full(tmp_path, 2, 2, broken=Break(3, how))
    assert bad(reports) == {"node1": ("local rank 1: its matrix products are wrong: 40 of 2621440 elements, limit 0",)}
    assert reports[0].stage == "done" and reports[1].ended


def test_limits_of_speed_are_kept(tmp_path: Path) -> None:
    (report,) = full(tmp_path, 1, 2, config=replace(FULL, tflops=1e6, link=1e6))
    assert len(report.problems) == 4
    assert report.problems[1].endswith("TFLOP/s, below tflops=1e+06")
    assert report.problems[3].endswith("GB/s, below link=1e+06")


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    """Its node says so before the time is over, and the other node goes on to the end."""
    reports = full(tmp_path, 2, 2, config=replace(FULL, timeout=8), broken=Break(3, "absent"))
    assert bad(reports) == {"node1": ("local rank 1: no word after its device's checks within 4 s",)}
    assert reports[0].stage == "done"


def test_a_node_that_never_comes_is_named(tmp_path: Path) -> None:
    reports = full(tmp_path, 2, 1, config=replace(FULL, timeout=4), broken=Break(1, "absent"))
    assert bad(reports) == {"node1": ("no report within 4 s",)}
    assert reports[0].stage == "done"


def test_a_first_node_that_never_comes_condemns_no_other(tmp_path: Path) -> None:
    reports = full(tmp_path, 3, 1, config=replace(FULL, timeout=4), broken=Break(0, "absent"))
    assert bad(reports) == {"node0": ("no report within 4 s",)}
    assert "the first rank doesn't answer at 127.0.0.1" in reports[1].notes[0]


def test_a_failing_all_reduce_across_nodes_condemns_who_left_it(tmp_path: Path) -> None:
    reports = full(tmp_path, 3, 1, config=replace(FULL, timeout=5), broken=Break(2, "mute"))
    assert list(bad(reports)) == ["node2"]
    assert "without a word" in reports[2].problems[0]
    assert all("all-reduce across nodes" in report.notes[0] for report in reports[:2])


def test_a_device_that_hangs_is_told_and_the_process_ends(tmp_path: Path) -> None:
    write_request(tmp_path, replace(FULL, timeout=3), str(tmp_path), time.time(), ["node0"])
    assert run_until_killed(check, 1, tmp_path, 1, Break(0, "hang"), timeout=30) == [0]
    assert bad(read_reports(tmp_path, ["node0"])) == {"node0": ("its own checks: no end within 2 s",)}


def start(folder: Path, ranks: list[int]) -> list[subprocess.Popen[bytes]]:
    """The verb itself: one process on each of so many nodes."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "framework.cli", "health", str(folder)],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": str(len(ranks)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUBOID_NODE": f"node{rank}"}
            | {"CUBOID_SWITCH": f"s0.node{rank}", "FAULTY": str(rank)},
        )
        for rank in ranks
    ]


def test_the_basic_level_names_a_full_disk_and_a_failing_command(tmp_path: Path) -> None:
    """The command fails on node 1 alone; the disk's limit is above what any has."""
    command = 'echo checking; echo "node $CUBOID_NODE: fan 3 is off" >&2; test $FAULTY != 1'
    config = HealthConfig(level="basic", disk=1e9, shm=0, host=0, command=command, timeout=30)
    names = ["node0", "node1"]
    write_request(tmp_path, config, str(tmp_path), time.time(), names)
    assert [process.wait(60) for process in start(tmp_path, [0, 1])] == [0, 0]
    first, second = read_reports(tmp_path, names)
    assert first.switch == "s0.node0" and abs(second.numbers["clock_s"]) < 0.5
    assert len(first.problems) == 1 and first.problems[0].endswith("GB free, below disk=1e+09")
    assert second.problems[1] == "command: status 1: node node1: fan 3 is off"


def test_reports_of_an_earlier_check_are_not_taken(tmp_path: Path) -> None:
    full(tmp_path, 1, 1)
    kept = (tmp_path / "node0.json").read_text()
    write_request(tmp_path, FULL, str(tmp_path), 0.0, ["node0"])
    assert not (tmp_path / "node0.json").exists()
    (tmp_path / "node0.json").write_text(kept)
    assert bad(read_reports(tmp_path, ["node0"])) == {"node0": ("no report within 60 s",)}


# What only all reports together tell.


def report(node: int, **numbers: float) -> NodeReport:
    return NodeReport(f"node{node}", "", numbers=numbers, stage="done", ended=True)


def test_a_wrong_clock_is_told_by_the_majority(tmp_path: Path) -> None:
    request = write_request(tmp_path, FULL, "", 0.0, ["node0", "node1", "node2"])
    ahead = [report(0, clock_s=0.0), report(1, clock_s=-90.0), report(2, clock_s=-90.1)]  # the first node is wrong
    assert bad(compare_clocks(ahead, request)) == {
        "node0": ("its clock is 90.0 s ahead of the others', above clock=2",)
    }
    behind = [report(0, clock_s=0.0), report(1, clock_s=-3.0)]
    assert bad(compare_clocks(behind, request)) == {"node1": ("its clock is 3.0 s behind the others', above clock=2",)}
    assert bad(compare_clocks([report(0, clock_s=0.0), report(1, clock_s=1.9)], request)) == {}


def test_a_slow_node_is_told_by_its_neighbours(tmp_path: Path) -> None:
    request = write_request(tmp_path, replace(FULL, network=10), "", 0.0, ["node0"])
    rates = [report(node, pair_gbs=rate, network_gbs=3.0) for node, rate in enumerate([20.0, 20.0, 3.0, 21.0])]
    assert bad(compare_networks(rates, request)) == {"node2": ("3 GB/s with the faster neighbour, below network=10",)}
    assert compare_networks(rates, request)[0].notes == ("all-reduce across nodes: 3 GB/s, below network=10",)


def test_an_all_reduce_that_fails_for_all_condemns_nobody(tmp_path: Path) -> None:
    request = write_request(tmp_path, FULL, "", 0.0, ["node0", "node1", "node2"])
    reports = [replace(report(node), stage="across", notes=("it failed",)) for node in range(3)]
    assert bad(compare_stages(reports, request)) == {}
    unended = [replace(each, ended=False) for each in reports]  # the step was ended from outside
    assert bad(compare_stages(unended, request)) == {}
    apart = [*reports[:2], replace(reports[2], stage="local")]
    assert bad(compare_stages(apart, request)) == {"node2": ("it didn't meet the first node, node0, and others did",)}
    host_bad = [replace(reports[0], problems=("its disk",)), *apart[1:]]
    assert list(bad(compare_stages(host_bad, request))) == ["node0"]


# A node's own checks.


def test_checks_without_torch_name_the_value_and_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can't be written" in check_disk(tmp_path / "file", 0).problems[0]
    assert check_disk(tmp_path / "made", 0).problems == ()
    assert list((tmp_path / "made").iterdir()) == []
    assert "below shm=1e+09" in check_shm(1e9, str(tmp_path)).problems[0]
    assert check_shm(1e9, str(tmp_path / "absent")).problems == ()
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    1000000 kB\n")
    assert check_memory(2, str(tmp_path / "meminfo")).problems == (
        "1.0 GB of memory are available, below host=2: another process holds the rest",
    )
    assert check_memory(1, str(tmp_path / "meminfo")).numbers == {"memory_gb": 1.0}


def test_a_command_is_judged_by_its_status_and_has_its_time() -> None:
    assert check_command("", 1).problems == ()
    assert check_command("echo fine; sleep 60 &", 5).problems == ()
    assert check_command("exit 3", 5).problems == ("command: status 3: it said nothing",)
    begin = time.monotonic()
    assert check_command("sleep 60", 0.2).problems == ("command: no end within 0 s: sleep 60",)
    assert time.monotonic() - begin < 5


def test_a_request_is_read_as_it_was_written(tmp_path: Path) -> None:
    request = write_request(tmp_path, replace(FULL, command="true"), "/scratch", 5.0, ["a", "b"], gpus=True)
    assert read_request(tmp_path) == request
    with pytest.raises(ValueError, match="is started by a job's script"):
        read_request(tmp_path / "elsewhere")


def test_a_gpu_that_fell_off_is_a_problem(tmp_path: Path) -> None:
    (told,) = full(tmp_path, 1, 1)
    assert told.problems == ()
    write_request(tmp_path, FULL, str(tmp_path), time.time(), ["node0"], gpus=True)
    run_ranks(check, 1, tmp_path, 1)
    (told,) = read_reports(tmp_path, ["node0"])
    assert len(told.problems) == 1 and "sees no GPU" in told.problems[0]


def test_bandwidth_is_of_the_bus() -> None:
    assert health_ranks.Reduced(0, 1.0).problems("x") == ()
    assert health_ranks.Reduced(2, 1.0).problems("x") == ("x: 2 elements of the sum are wrong, limit 0",)
