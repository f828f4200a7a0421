"""What `cuboid scale` prints, and the recipe that it writes: every changed key below the reason for it."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

import yaml

from framework.layers import Tree
from framework.plan.scale import Change, Figures

WIDTH: Final = 120


def table_lines(before: Figures, after: Figures) -> list[str]:
    """The two recipes beside each other."""
    rows = [("", "before", "after")]
    rows += [
        (name, form.format(getattr(before, name)), form.format(getattr(after, name)))
        for name, form in (
            ("clip", "{}"),
            ("seconds", "{:.4g}"),
            ("tokens", "{:,}"),
            ("petaflops", "{:.3g}"),
            ("attention", "{:.0%}"),
            ("samples", "{:,}"),
            ("rank_tokens", "{:,}"),
        )
    ]
    words = {
        "tokens": "tokens a sample",
        "petaflops": "PFLOP a sample, forward and backward",
        "attention": "  of it attention",
        "samples": "samples a step",
        "rank_tokens": "tokens a rank, in a forward",
    }
    named = [(words.get(name, name), left, right) for name, left, right in rows]
    first, second, third = (max(len(row[i]) for row in named) for i in range(3))
    return [f"{name:{first}}  {left:>{second}}  {right:>{third}}".rstrip() for name, left, right in named]


def change_lines(changes: Sequence[Change]) -> list[str]:
    """A line for each change, and one for why."""
    return [
        line
        for change in changes
        for line in (f"{change.key}: {shown(change.before)} -> {shown(change.after)}", f"    {change.reason}")
    ]


def shown(value: Any) -> str:
    """A value in a line, as YAML has it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def recipe_text(tree: Tree, changes: Sequence[Change], stages: Sequence[Tree], header: Sequence[str]) -> str:
    """The file. tree: every key, changed ones included."""
    reasons = {change.key: change for change in changes}
    lines = [f"# {line}".rstrip() for line in header]
    if stages:
        train = {key: value for key, value in tree.get("train", {}).items() if key != "steps"}
        tree = {key: value for key, value in tree.items() if key != "train"} | ({"train": train} if train else {})
    lines += node_lines(tree, reasons, "", "")
    if stages:
        lines += comment("half the frame rate first: twice the seconds at the tokens that the weights know", "")
        lines += node_lines({"stages": list(stages)}, {}, "", "")
    return "\n".join(lines) + "\n"


def node_lines(node: Tree, reasons: dict[str, Change], path: str, pad: str) -> Iterator[str]:
    """A mapping in block style."""
    for key, value in node.items():
        here = f"{path}.{key}".lstrip(".")
        if here in reasons:
            yield from comment(f"{reasons[here].reason}; was {shown(reasons[here].before)}", pad)
        if isinstance(value, dict) and value:
            yield f"{pad}{key}:"
            yield from node_lines(value, reasons, here, pad + "  ")
        elif isinstance(value, list) and value and all(isinstance(item, dict) and item for item in value):
            yield f"{pad}{key}:"
            for index, item in enumerate(value):
                yield from item_lines(item, reasons, f"{here}.{index}", pad + "  ")
        else:
            yield f"{pad}{shown({key: value})[1:-1]}"


def item_lines(item: Tree, reasons: dict[str, Change], path: str, pad: str) -> Iterator[str]:
    """An entry of a list: the dash stands before its first key, comments above that."""
    begun = False
    for line in node_lines(item, reasons, path, pad + "  "):
        if not begun and not line.lstrip().startswith("#"):
            begun = True
            line = f"{pad}- {line[len(pad) + 2 :]}"
        yield line


def comment(text: str, pad: str) -> list[str]:
    """A text as a comment of the lines' width."""
    return textwrap.wrap(text, WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ", break_long_words=False)
