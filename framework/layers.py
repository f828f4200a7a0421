"""Files over files over words, as plain trees of keys.

    base files (depth first) < the file < key=value

`base:` names one file or several, relative to the file itself. Dicts merge, lists replace. What the keys mean is the
recipe's business.
"""

import difflib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
Check = Callable[[Tree, Path], object]


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, which the loader would otherwise overwrite in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise yaml.YAMLError(
                    f"the key {name!r} stands twice, the second time on line {key_node.start_mark.line + 1}"
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_layers(path: Path, *, check: Check, below: tuple[Path, ...] = ()) -> Tree:
    """A file laid over its bases, as a plain tree. check: called with each file's own tree, raises ValueError."""
    path = path.resolve()
    if path in below:
        chain = " -> ".join(str(p) for p in (*below[below.index(path) :], path))
        raise ValueError(f"the bases of a recipe form a cycle: {chain}")
    if not path.is_file():
        folder = path.parent
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")]) if folder.is_dir() else []
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise ValueError(f"no such recipe: {path}{hint}")
    try:
        tree = yaml.load(path.read_text(), Loader=UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} isn't valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base must be a file name or a list of them, not {bases!r}")
    check(tree, path)
    merged: Tree = {}
    for base in bases:
        overlay(merged, read_layers(path.parent / base, check=check, below=(*below, path)))
    overlay(merged, tree)
    return merged


def overlay(tree: Tree, layer: Tree) -> None:
    """Lay `layer` over `tree` in place: dicts merge, all else replaces.

    `name` chooses among sections, so a layer that brings another name drops the sections of every other choice.
    """
    if "name" in layer and tree.get("name") != layer["name"]:
        for key in [key for key, value in tree.items() if isinstance(value, dict) and key != layer["name"]]:
            del tree[key]
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            overlay(tree[key], value)
        else:
            tree[key] = value


def apply_overrides(tree: Tree, overrides: list[str]) -> Tree:
    """Lay key=value words over a tree, in place. Values are YAML; a number in the key is an index into a list."""
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} isn't of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"the value of {word!r} isn't valid YAML") from None
        assign(tree, key.split("."), value, key)
    return tree


def assign(node: Any, path: list[str], value: object, key: str) -> None:
    """Set the leaf at `path` below a tree's node."""
    first, *rest = path
    if isinstance(node, list):
        if not first.isdecimal() or int(first) >= len(node):
            raise ValueError(f"{key}: {first!r} isn't an index into a list of {len(node)}")
        if rest:
            assign(node[int(first)], rest, value, key)
        else:
            node[int(first)] = value
    elif not isinstance(node, dict):
        raise ValueError(f"{key}: there is no {first!r} below the value {node!r}")
    elif rest:
        if node.get(first) is None:
            node[first] = {}
        assign(node[first], rest, value, key)
    else:
        overlay(node, {first: value})
