"""What the ranks of the tests of measuring do."""

from pathlib import Path

from framework.environment import Environment
from framework.plan.hardware import load_hardware
from framework.programs.bench import Bench, bench
from framework.programs.calibrate import calibrate
from framework.recipe import load_recipe


def time_recipe(env: Environment, recipe: Path, words: list[str], hardware: str) -> Bench:
    """`cuboid bench` of 3 steps."""
    loaded = load_recipe(recipe, words)
    return bench(loaded, env, name="tiny", steps=3, minutes=1.0, hardware=load_hardware(hardware))


def measure(env: Environment, out: Path) -> None:
    """A rank of `cuboid plan --calibrate`."""
    calibrate(env, out)
