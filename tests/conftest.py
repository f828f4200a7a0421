"""Fixtures that tests of several folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import ObjectStore
from tiny import write_latents, write_recipe

UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`alone`: tests outside tests/unit, whose ranks take every core; in it, files that time things say so."""
    for item in items:
        if not item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight random latents of clip 5x16x16 in three shards. Read only: damage a copy."""
    return write_latents(tmp_path_factory.mktemp("tiny") / "latents")


@pytest.fixture
def tiny_recipe(tiny_shards: Path, tmp_path: Path) -> Path:
    """The tiny recipe on the tiny shards; its run is `tmp_path / "run"`."""
    return write_recipe(tmp_path, tiny_shards)


@pytest.fixture(scope="session")
def rabbit_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents that tools/quickstart.sh makes from the real clip."""
    from framework.curate.config import PrepareConfig
    from framework.curate.prepare import prepare
    from framework.programs.encode import encode
    from framework.recipe import load_recipe

    root, folder = Path(__file__).parent.parent, tmp_path_factory.mktemp("rabbit")
    prepare(root / "tests/assets", root / "tests/assets/captions.jsonl", folder / "videos", config=PrepareConfig())
    recipe = load_recipe(root / "recipes/quickstart.yaml", [])
    encode(recipe, folder / "videos", folder / "latents", dtype="float16")
    return folder / "latents"


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running S3 server with the bucket "vid"; use a prefix of your own."""
    store = ObjectStore(tmp_path_factory.mktemp("seaweedfs"))
    yield store
    store.close()
