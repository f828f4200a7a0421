"""A cluster's file: read, checked, typed.

    defaults < base files (depth first) < the file < key=value

As with a recipe; where the two are mixed up, the message says so. Three things differ. `name` is a name, and by default
the file's. Shell keeps its ${VARIABLES}. Of `sbatch`, true is an option that takes no value, false one that is left out
although a base has it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.launch.config import ClusterConfig
from framework.layers import Tree, apply_overrides, foreign_keys, merge_typed, read_layers
from framework.recipe import Recipe


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """A cluster's file, its bases and key=value words. Raises ValueError with the key, the value and the fix."""
    tree = apply_overrides(read_layers(path, check=check_layer, noun="cluster"), list(overrides))
    tree.setdefault("name", path.stem)
    tree = shell_kept(settled(tree, str(path)))
    try:
        cluster = OmegaConf.to_object(merge_typed(ClusterConfig, tree, f"the cluster {path}"))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    assert isinstance(cluster, ClusterConfig)
    return cluster


def check_layer(tree: Tree, file: Path) -> None:
    """Raises ValueError for a file with keys that a cluster doesn't have, or values of another type."""
    if foreign := foreign_keys(tree, ClusterConfig, Recipe):
        raise ValueError(
            f"{file} is a recipe (it sets {', '.join(foreign[:3])}), where a cluster's file is wanted: see "
            "slurm/clusters/ for some, and give the recipe as RECIPE"
        )
    merge_typed(ClusterConfig, shell_kept(settled(tree, str(file))), str(file))


def settled(tree: Tree, source: str) -> Tree:
    """The tree with the truth values of `sbatch` as sbatch has them. Raises ValueError for one in `environment`, which
    nobody knows how to spell.
    """
    environment, sbatch = tree.get("environment"), tree.get("sbatch")
    for name, value in environment.items() if isinstance(environment, dict) else ():
        if value is None or isinstance(value, bool):
            raise ValueError(f"{source}: environment.{name}={value}: write it in quotes, as processes are to read it")
    if not isinstance(sbatch, dict):
        return tree
    words = {option: "" if value is None or value is True else value for option, value in sbatch.items()}
    return tree | {"sbatch": {option: value for option, value in words.items() if value is not False}}


def shell_kept(node: Any) -> Any:
    """The tree with every ${ escaped, which OmegaConf would take for a key of its own."""
    match node:
        case dict():
            return {key: shell_kept(value) for key, value in node.items()}
        case list():
            return [shell_kept(value) for value in node]
        case str():
            return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", node)
    return node
