"""What a benchmark's numbers depend on: commit, date, versions, hardware."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def machine(*packages: str) -> dict[str, str | int]:
    """Name -> value; `packages` are those whose version matters besides torch's."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = " (framework/ changed)" if git("status", "--porcelain", "framework") else ""
    return {
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
