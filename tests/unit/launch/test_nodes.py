"""The memory of bad nodes."""

import multiprocessing
from pathlib import Path

import pytest

from framework.launch.config import ClusterConfig
from framework.launch.nodes import HOUR, LONGEST, excluded, forget, nodes_path, read_nodes, remember


def test_a_node_is_left_out_until_its_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "nodes.json"
    assert excluded(path, 0.0) == []
    remember(path, "node2", "its disk is full", 1000.0, 2.0)
    remember(path, "node1", "no report within 120 s", 1000.0, 3.0)
    assert excluded(path, 1000.0) == ["node1", "node2"]
    assert excluded(path, 1000.0 + 2 * HOUR) == ["node1"]
    assert excluded(path, 1000.0 + 3 * HOUR) == []
    (first, second) = read_nodes(path)
    assert (first.node, first.count, first.reason, first.since) == ("node1", 1, "no report within 120 s", 1000.0)
    assert second.until == 1000.0 + 2 * HOUR


def test_each_further_failure_doubles_the_time(tmp_path: Path) -> None:
    path, now = tmp_path / "nodes.json", 0.0
    for count, hours in enumerate([72, 144, 288, 576, LONGEST, LONGEST], start=1):
        bad = remember(path, "node1", "its GPU", now, 72.0)
        assert (bad.count, bad.until - bad.since) == (count, hours * HOUR)
        now = bad.until + 1
    assert [bad.count for bad in read_nodes(path)] == [6]


def test_a_node_that_stayed_good_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    remember(path, "node1", "its GPU", 0.0, 1.0)
    remember(path, "node2", "its GPU", 2 * HOUR, 1.0)
    assert [bad.node for bad in read_nodes(path)] == ["node2"]
    assert remember(path, "node1", "its GPU", 2 * HOUR, 1.0).count == 1


def test_the_same_failure_seen_by_two_jobs_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    remember(path, "node1", "its GPU", 0.0, 1.0)
    assert remember(path, "node1", "its GPU", 10.0, 1.0).count == 1
    assert remember(path, "node1", "its disk", 20.0, 1.0).count == 2


def test_a_node_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    remember(path, "node1", "its GPU", 0.0, 1.0)
    assert forget(path, "node1") and not forget(path, "node1")
    assert excluded(path, 0.0) == []


def remember_many(path: Path, first: int) -> None:
    for number in range(first, first + 25):
        remember(path, f"node{number:03}", "x", 0.0, 1.0)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path, context = tmp_path / "nodes.json", multiprocessing.get_context("fork")
    writers = [context.Process(target=remember_many, args=(path, 25 * index)) for index in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert excluded(path, 0.0) == [f"node{number:03}" for number in range(100)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["nodes.json", "nodes.json.lock"]


def test_the_place_is_the_cluster_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nodes_path(ClusterConfig("big")) == tmp_path / ".cuboid/nodes-big.json"
    assert nodes_path(ClusterConfig("big", nodes_file="~/shared.json")) == tmp_path / "shared.json"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nodes.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="isn't a list of bad nodes"):
        excluded(tmp_path / "nodes.json", 0.0)
