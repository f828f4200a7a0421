"""The syntax trees of framework/, for the tests of the rules of the tree. Nothing of it is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[1]
ROOT: Final = REPOSITORY / "framework"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, ast.Module]:
    """Path below framework/ -> syntax tree."""
    files = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}


TREES: Final = sources()
MODULES: Final = frozenset(name.removesuffix(".py").replace("/", ".") for name in TREES)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere, under TYPE_CHECKING and inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(tree: ast.AST) -> Iterator[tuple[Function, bool]]:
    """Every function, and whether it's a method that is given self or cls."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
                yield child, isinstance(node, ast.ClassDef) and not static


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def dataclass_words(node: ast.ClassDef) -> str | None:
    """The decorator's text, or None where a class is no dataclass."""
    return next((text for d in node.decorator_list if (text := ast.unparse(d)).startswith("dataclass")), None)


def chain(node: ast.expr) -> str:
    """a.b["c"].d -> "a.b.d", empty when it doesn't start with a name."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        below = chain(node.value)
        return below and f"{below}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
