"""One lab for all tests on a real Slurm."""

from collections.abc import Iterator

import pytest
from slurm_lab import Lab, NoLabError


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A Slurm of four nodes. A test leaves no job and no dead node behind."""
    try:
        lab = Lab(tmp_path_factory.mktemp("slurm"))
    except NoLabError as reason:
        pytest.skip(str(reason))
    yield lab
    lab.close()
