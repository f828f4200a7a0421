"""The training of tests/training_jobs.py, at once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from slurm_lab import Lab, NoLabError
from training_jobs import SCENARIOS

Running = dict[str, Future[None]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All of them, begun on a Slurm with nodes enough."""
    folder = tmp_path_factory.mktemp("training")
    try:
        lab = Lab(folder / "lab", num_nodes=6)
    except NoLabError as reason:
        pytest.skip(str(reason))
    for name in SCENARIOS:
        (folder / name).mkdir()
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {name: pool.submit(scenario, lab, folder / name) for name, scenario in SCENARIOS.items()}
        pool.shutdown(wait=True, cancel_futures=True)
    lab.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_training(running: Running, name: str) -> None:
    running[name].result(timeout=290)
