"""The keys by which an attempt is watched, and the piece of work that each rank times."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import write_recipe

from framework.config import LogConfig
from framework.launch import check
from framework.parallel.mesh import lone_mesh
from framework.programs.config import WatchConfig
from framework.programs.probe import Probe
from framework.recipe import load_recipe
from framework.run import check_changes


@pytest.mark.parametrize("word", ["start=0", "step=-1", "save=0", "probe_every=0"])
def test_keys_are_checked(tmp_path: Path, word: str) -> None:
    with pytest.raises(ValueError, match=rf"watch\.{word.partition('=')[0]}=.* must be"):
        load_recipe(write_recipe(tmp_path, tmp_path, [f"watch.{word}"]), [])


def test_keys_are_free_on_resume(tmp_path: Path) -> None:
    stored = load_recipe(write_recipe(tmp_path, tmp_path), [])
    assert stored.watch == WatchConfig(1800, 900, 1800, 100)
    check_changes(stored, replace(stored, watch=WatchConfig(1, 2, 3, 4), log=LogConfig(wandb="videos")))


def test_the_probe_times_a_piece_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(torch.device("cpu"), lone_mesh().control)
    little = probe.measure()
    monkeypatch.setattr("framework.programs.probe.CPU_SIDE", 768)
    assert 0 < little < probe.measure() / 4, "27 times the work"


def test_a_board_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    recipe = load_recipe(write_recipe(tmp_path, tmp_path), [])
    check.check_boards(recipe)
    with pytest.raises(ValueError, match=r"log\.wandb=videos needs .* pip install 'cuboid\[wandb\]'"):
        check.check_start(replace(recipe, log=LogConfig(wandb="videos")), num_ranks=1, num_gpus=0)
