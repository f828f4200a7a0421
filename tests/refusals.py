"""A start that is refused, through the real command: status 2, one message, nothing on standard output."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def refused_start(recipe: Path, environment: dict[str, str]) -> tuple[str, float]:
    """What `cuboid train` says on standard error, and the seconds that it took."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "framework.cli", "train", str(recipe)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    return done.stderr, time.monotonic() - begin
