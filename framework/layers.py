"""Files over files over words, as plain trees of keys.

    base files (depth first) < the file < key=value

`base:` names one file or several, relative to the file itself. Dicts merge, lists replace. What the keys mean says the
dataclass on which a tree is merged then (`merge_typed`): a recipe's, or a cluster's.
"""

import difflib
import re
from collections.abc import Callable, Hashable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Tree = dict[str, Any]
Check = Callable[[Tree, Path], object]
# What YAML 1.1 takes for the number 86400, for a truth value and for a date, and 1.2 for the word that it is.
WORDS: Final = re.compile(
    r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?|(?i:yes|no|on|off)|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?"
)


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which the loader would otherwise overwrite in silence, and that takes
    24:00:00 and off for words.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0] and WORDS.fullmatch(value):
            return "tag:yaml.org,2002:str"
        return str(super().resolve(kind, value, implicit))

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


def read_layers(path: Path, *, check: Check, noun: str = "recipe", below: tuple[Path, ...] = ()) -> Tree:
    """A file laid over its bases, as a plain tree. check: called with each file's own tree, raises ValueError. noun:
    what such a file is called.
    """
    path = path.resolve()
    if path in below:
        chain = " -> ".join(str(p) for p in (*below[below.index(path) :], path))
        raise ValueError(f"the bases of a {noun} form a cycle: {chain}")
    if not path.is_file():
        folder = path.parent
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")]) if folder.is_dir() else []
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise ValueError(f"no such {noun}: {path}{hint}")
    try:
        tree = yaml.load(path.read_text(), Loader=StrictLoader)
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
        overlay(merged, read_layers(path.parent / base, check=check, noun=noun, below=(*below, path)), top=True)
    overlay(merged, tree, top=True)
    return merged


def overlay(tree: Tree, layer: Tree, *, top: bool = False) -> None:
    """Lay `layer` over `tree` in place: dicts merge, all else replaces.

    Below the top, `name` chooses among sections, so a layer that brings another name drops the sections of every other
    choice.
    """
    if not top and "name" in layer and tree.get("name") != layer["name"]:
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
            value = yaml.load(text, Loader=StrictLoader)
        except yaml.YAMLError:
            raise ValueError(f"the value of {word!r} isn't valid YAML") from None
        assign(tree, key.split("."), value, key, top=True)
    return tree


def assign(node: Any, path: list[str], value: object, key: str, *, top: bool = False) -> None:
    """Set the leaf at `path` below a tree's node. top: whether the node is the tree itself."""
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
        overlay(node, {first: value}, top=top)


def merge_typed(schema: type, tree: Tree, source: str) -> DictConfig:
    """Merge a plain tree on a dataclass: names and types are checked, values not yet. Raises ValueError with the key
    and, where there is no such, the nearest one. source: what the tree is, in the message.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), tree)
    except (OmegaConfBaseException, TypeError) as error:
        message = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "a value of the list")
        raise ValueError(f"{source}: {wrong_key(schema, tree)}: {message}") from None
    assert isinstance(merged, DictConfig)
    return merged


def wrong_key(schema: type, tree: Tree, parents: tuple[str, ...] = ()) -> str:
    """The innermost key of a tree that doesn't merge, with its value: OmegaConf often names none."""
    for name, value in tree.items():
        layer: Tree = {name: value}
        for parent in reversed(parents):
            layer = {parent: layer}
        try:
            OmegaConf.merge(OmegaConf.structured(schema), layer)
        except (OmegaConfBaseException, TypeError):
            inside = wrong_key(schema, value, (*parents, name)) if isinstance(value, dict) else ""
            return inside or f"{'.'.join((*parents, str(name)))}={value}"
    return ""


def foreign_keys(tree: Tree, schema: type, other: type) -> list[str]:
    """The keys of a tree that only `other` has, where they are more than those of its own schema: then the file is of
    the other kind. Else none.
    """
    own, others = ({item.name for item in fields(each)} for each in (schema, other))
    foreign = [key for key in tree if key in others - own]
    return foreign if len(foreign) > len(own & tree.keys()) else []
