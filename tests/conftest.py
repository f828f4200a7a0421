"""Fixtures that tests of several folders share."""

from pathlib import Path

import pytest
from tiny import write_latents, write_recipe


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight random latents of clip 5x16x16 in three shards. Read only: damage a copy."""
    return write_latents(tmp_path_factory.mktemp("tiny") / "latents")


@pytest.fixture
def tiny_recipe(tiny_shards: Path, tmp_path: Path) -> Path:
    """The tiny recipe on the tiny shards; its run is `tmp_path / "run"`."""
    return write_recipe(tmp_path, tiny_shards)
