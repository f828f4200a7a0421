"""The failures of tests/failures.py, several at once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from failures import SCENARIOS
from slurm_lab import Lab, NoLabError

AT_ONCE = 4
Running = dict[str, Future[None]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All of them, begun on a Slurm with nodes enough, as each takes up to three for itself alone."""
    folder = tmp_path_factory.mktemp("failures")
    try:
        lab = Lab(folder / "lab", num_nodes=4 * AT_ONCE, slurmd_timeout=20)
    except NoLabError as reason:
        pytest.skip(str(reason))
    places: dict[str, Path] = {name: folder / name for name in SCENARIOS}
    for place in places.values():
        place.mkdir()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(scenario, lab, places[name]) for name, scenario in SCENARIOS.items()}
        pool.shutdown(wait=True, cancel_futures=True)
    lab.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_failure(running: Running, name: str) -> None:
    running[name].result(timeout=280)
