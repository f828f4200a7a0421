"""A sweep: one file, a run for each of its entries.

optimizer.lr: [1e-4, 2e-4]        keys with their values: every combination,
seed: [0, 1, 2]                   the last key changes fastest

- [optimizer.lr=1e-4]             or a list: the words of each run
- [optimizer.lr=2e-4, optimizer.warmup=500]
"""

from itertools import product
from pathlib import Path

import yaml

from framework.layers import StrictLoader


def read_sweep(path: Path) -> list[list[str]]:
    """The words of each run. Raises ValueError with the file and what is wrong in it."""
    if not path.is_file():
        raise ValueError(f"--array {path}: there is no such file")
    try:
        tree = yaml.load(path.read_text(), Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} isn't valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(tree, dict) and tree and all(isinstance(values, list) and values for values in tree.values()):
        return [
            [f"{key}={spell(value)}" for key, value in zip(tree, row, strict=True)] for row in product(*tree.values())
        ]
    if isinstance(tree, list) and tree and all(isinstance(row, list) for row in tree):
        return [[str(word) for word in row] for row in tree]
    raise ValueError(f"{path} must hold keys, each with a list of values, or a list of lists of key=value words")


def spell(value: object) -> str:
    """A value as a word has it."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")
