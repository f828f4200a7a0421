"""No mutable module state, and configs that are frozen, typed and documented: on the syntax tree of framework/."""

import ast
import re
from typing import Final

import pytest
from syntax import TREES, Function, chain, classes, dataclass_words

FROZEN: Final = frozenset(
    node.name for tree in TREES.values() for node in classes(tree) if "frozen=True" in (dataclass_words(node) or "")
)
IMMUTABLE_MAKERS: Final = FROZEN | {
    *(
        "MappingProxyType",
        "frozenset",
        "tuple",
        "range",
        "compile",
        "TypeVar",
        "uint64",
        "getLogger",
        "prod",
        "Path",
        "resolve",
    )
}
DISPLAYS: Final = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
# Declares one operation absent, or DeepSpeed compiles it for minutes (see `quiet`).
ASSIGNED_ON_PURPOSE: Final = ["parallel/zero/deepspeed.py assigns to deepspeed.ops.__compatible_ops__"]


def mutable(value: ast.expr) -> bool:
    """Whether an expression makes something that can be changed."""
    if isinstance(value, DISPLAYS):
        return True
    if isinstance(value, ast.Call):
        if chain(value.func).rpartition(".")[2] not in IMMUTABLE_MAKERS:
            return True
        inner = [child for a in value.args for child in (ast.iter_child_nodes(a) if isinstance(a, DISPLAYS) else [a])]
        return any(mutable(child) for child in inner if isinstance(child, ast.expr))
    return any(mutable(child) for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))


def is_type_expression(value: ast.expr) -> bool:
    """Names, subscripts, unions and literals; `Annotated[..., typer.Argument(...)]` is one too."""
    text = ast.unparse(value)
    return not isinstance(value, (*DISPLAYS, ast.Call)) and (text.startswith("Annotated[") or not mutable_inside(value))


def mutable_inside(value: ast.expr) -> bool:
    """Like `mutable`, but the list of `Callable[[A], B]` is no state."""
    lists = {
        id(n.slice.elts[0]) for n in ast.walk(value) if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Tuple)
    }
    return any(isinstance(n, (*DISPLAYS, ast.Call)) and id(n) not in lists for n in ast.walk(value))


def state_of(statement: ast.stmt) -> str | None:
    """Why a statement at module level is more than a definition or a constant."""
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
            return None
        case ast.Expr(value=ast.Constant(value=str())):
            return None
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=[]):
            return next((why for inner in body if (why := state_of(inner))), None)
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__")), orelse=[]):
            return None
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value)
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
        ):
            if name in ("logger", "app") and isinstance(value, ast.Call):
                return None
            if re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name):
                return f"{name} can be changed" if mutable(value) else None
            if re.fullmatch(r"_?[A-Z]\w*", name) and is_type_expression(value):
                return None
            return f"{name} is neither a constant nor a type"
    text = ast.unparse(statement).splitlines()[0]
    return None if text.startswith("app.add_typer(") else f"{text} works at import"


@pytest.mark.parametrize(
    "text",
    ["a = 1", "A = []", "A = {1: 2}", "A = ([],)", "A = dict()", "A: dict = {}", "f()", "A += 1", "A = tuple([[]])"],
)
def test_module_state_is_seen(text: str) -> None:
    assert state_of(ast.parse(text).body[0])


@pytest.mark.parametrize(
    "text",
    [
        "A = 1 << 4",
        "A = ('a', -1)",
        "_A = MappingProxyType({'a': (1,)})",
        "A = frozenset({1})",
        "T = TypeVar('T')",
        "A = re.compile('x')",
        "Velocity = Callable[[Tensor, float], Tensor]",
        "Frames = Tensor | np.ndarray",
        "A: Final = 3",
    ],
)
def test_constants_and_types_are_no_state(text: str) -> None:
    assert state_of(ast.parse(text).body[0]) is None


def test_modules_hold_no_mutable_state() -> None:
    found = {f"{path}: {why}" for path, tree in TREES.items() for node in tree.body if (why := state_of(node))}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                found.add(f"{path}: global {', '.join(node.names)}")
            elif isinstance(node, ast.ClassDef):
                values = (s.value for s in node.body if isinstance(s, (ast.Assign, ast.AnnAssign)) and s.value)
                found |= {f"{path}: {node.name} shares {ast.unparse(v)}" for v in values if isinstance(v, DISPLAYS)}
            elif isinstance(node, Function):
                cached = {chain(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
                if cached & {"cache", "lru_cache", "functools.cache", "functools.lru_cache"} and node.args.args:
                    found.add(f"{path}: {node.name} keeps what it was called with")
    assert sorted(found) == []


def test_nothing_is_assigned_to_another_module() -> None:
    found = set()
    for path, tree in TREES.items():
        bound = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
            targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
            if isinstance(node, ast.Call) and chain(node.func) in ("setattr", "delattr"):
                targets = [ast.Attribute(node.args[0], "?", ast.Store())]
            names = {chain(t) for t in targets if isinstance(t, (ast.Attribute, ast.Subscript))}
            found |= {f"{path} assigns to {name}" for name in names if name.split(".")[0] in bound}
    assert sorted(found) == ASSIGNED_ON_PURPOSE


def test_dataclass_fields_are_annotated() -> None:
    found = {
        f"{path}: {node.name}.{ast.unparse(statement)}"
        for path, tree in TREES.items()
        for node in classes(tree)
        if dataclass_words(node)
        for statement in node.body
        if isinstance(statement, ast.Assign)
    }
    assert sorted(found) == []


def config_classes() -> list[tuple[str, ast.ClassDef]]:
    files = {path: tree for path, tree in TREES.items() if path == "recipe.py" or path.endswith("config.py")}
    return [(path, node) for path, tree in files.items() for node in tree.body if isinstance(node, ast.ClassDef)]


def test_configs_are_frozen_dataclasses() -> None:
    assert {f"{p}: {n.name}" for p, n in config_classes() if dataclass_words(n) != "dataclass(frozen=True)"} == set()


def test_config_fields_are_documented() -> None:
    """Each field by its name in the docstring of its class; a nested section speaks for itself."""
    found = set()
    for path, node in config_classes():
        text = ast.get_docstring(node) or ""
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and not re.search(
                r"\w+Config\b", ast.unparse(statement.annotation)
            ):
                name = ast.unparse(statement.target)
                if not re.search(rf"\b{name}\b", text):
                    found.add(f"{path}: {node.name}.{name}")
    assert sorted(found) == []
