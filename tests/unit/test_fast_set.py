"""The fast set: what checks a recipe before a job waits in a queue imports neither torch nor anything as slow.

Importing torch and DeepSpeed takes 3.5 s on two CPU cores and up to 17 s on a busy node.
"""

import subprocess
import sys
import time
from typing import Final

import pytest
from syntax import MODULES

pytestmark = pytest.mark.alone  # starts are timed

SLOW: Final = ("torch", "deepspeed", "streaming", "transformers")
FAST: Final = (
    {"cli", "recipe", "run", "environment", "shapes", "keys", "log", "launch.local", "data.shards", "data.buckets"}
    | {"fingerprint", "heartbeat", "history", "failure", "stacks", "checkpoint.attempt"}
    | {"launch.cluster", "launch.placement", "launch.snapshot", "launch.variables"}
    | {"cli_status", "launch.facts", "launch.status", "launch.logs"}
    | ({"storage", "launch.job", "launch.script", "launch.supervisor"} & MODULES)
    | {module for module in MODULES if module.startswith("plan.") or module.endswith(".config")}
)
# A stated second, times three: the machines of the tests are slower than a login node, and shared.
SECONDS: Final = 3.0

# Each module in a child of its own. Forked, for an interpreter's start costs ten times as much.
PROBE: Final = """
import importlib, os, sys
slow, modules = sys.argv[1].split(","), sys.argv[2].split(",")
for module in modules:
    if os.fork() == 0:
        importlib.import_module("framework." + module)
        print(module, *[name for name in slow if name in sys.modules], flush=True)
        os._exit(0)
    os.wait()
"""


def probe(modules: list[str]) -> dict[str, list[str]]:
    """Module -> which of SLOW its import leaves in sys.modules."""
    command = [sys.executable, "-c", PROBE, ",".join(SLOW), ",".join(modules)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_the_fast_set_is_fast() -> None:
    assert probe(sorted(FAST)) == {module: [] for module in FAST}


def test_the_probe_sees_torch() -> None:
    """A module that needs torch, so that the test above can fail."""
    assert probe(["batch"]) == {"batch": ["torch"]}


@pytest.mark.parametrize("words", [["--help"], ["train", "no/such.yaml"]])
def test_the_command_answers_at_once(words: list[str]) -> None:
    """The best of up to three: on a busy machine one may wait for its turn."""
    spent = []
    while len(spent) < 3 and min(spent, default=SECONDS) >= SECONDS:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "framework.cli", *words], capture_output=True, timeout=60, check=False)
        spent.append(time.perf_counter() - begin)
    assert min(spent) < SECONDS
