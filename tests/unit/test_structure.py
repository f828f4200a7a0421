"""The rules of the tree, on the syntax tree of framework/: nothing of it is imported."""

import ast
import re
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import pytest
from syntax import MODULES, REPOSITORY, ROOT, TREES, chain, functions, imported

# A module imports only from rows above its own; entries of a row don't import each other. The longest match counts.
ROWS: Final = (
    ("shapes", "keys", "fingerprint"),  # nouns of integers, which configs name in their signatures; hashes of files
    ("*.config", "config", "layers", "environment", "storage", "log"),
    ("plan.parameters", "stages.merge"),  # which a recipe's patterns name, and its stages
    ("recipe", "parallel.mesh", "parallel.fragments", "kernels", "history"),
    ("stages",),
    (
        "run",
        "batch",
        "parallel.collectives",
        "parallel.fake",
        "plan",
        "tokenizer",
        "text",
        "image",
        "optim",
        "ema",
    ),  # a run stores a recipe
    ("parallel.tensor_parallel", "parallel.context_parallel", "diffusion", "data", "heartbeat", "stacks"),
    ("models", "parallel.zero", "failure"),
    ("checkpoint", "metrics", "profiling", "evaluate", "curate", "forecast"),
    ("programs", "launch"),
    (
        "cli_bench",
        "cli_checkpoint",
        "cli_cluster",
        "cli_data",
        "cli_plan",
        "cli_scale",
        "cli_status",
        "cli_submit",
    ),
    ("cli",),
)

# Who may name what of torch.distributed: file pattern -> pattern of the names below it.
DISTRIBUTED: Final = (
    ("parallel/*", "*"),
    ("launch/health_ranks.py", "*"),
    ("checkpoint/*", "checkpoint.*"),
    ("checkpoint/*", "ProcessGroup"),
    ("checkpoint/*", "is_initialized"),
    ("programs/build.py", "init_process_group"),
    ("programs/build.py", "is_initialized"),
    ("programs/link_rates.py", "reduce"),  # DeepSpeed's, timed; none of ours
    ("metrics.py", "Work"),  # a type, imported under TYPE_CHECKING
)
ONLY: Final = (
    ("deepspeed", ("parallel/zero/deepspeed.py",)),
    ("streaming", ("data/shard*.py", "curate/*")),
    # A module imported by its name would pass the rows unseen.
    ("importlib.import_module", ()),
    ("runpy", ()),
)


def entry_of(module: str) -> tuple[int, str] | None:
    """Row and entry of a module; the longest entry that matches."""
    matches = [
        (row, entry)
        for row, entries in enumerate(ROWS)
        for entry in entries
        if fnmatch(module, entry) or module.startswith(entry + ".")
    ]
    configs = [match for match in matches if match[1] == "*.config"]
    return (configs or sorted(matches, key=lambda match: len(match[1])) or [None])[-1]


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of framework that are imported, without the prefix."""
    names = {name.removeprefix("framework.") for name in imported(tree) if name.startswith("framework.")}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    assert found <= MODULES, found - MODULES
    return found


def test_every_file_has_an_entry() -> None:
    assert {module for module in MODULES if entry_of(module) is None} == set()


def test_entries_are_found_by_the_longest_match() -> None:
    assert entry_of("parallel.zero.config") == (1, "*.config")
    assert entry_of("parallel.zero.deepspeed") == (7, "parallel.zero")
    assert entry_of("parallel.mesh") == (3, "parallel.mesh")
    assert entry_of("data.shards") == (6, "data")
    assert entry_of("cli") == (11, "cli")
    assert entry_of("parallel.helpers") is None
    assert entry_of("runner") is None


def test_modules_import_from_rows_above() -> None:
    found = set()
    for path, tree in TREES.items():
        module = path.removesuffix(".py").replace("/", ".")
        here = entry_of(module)
        for other in own_imports(tree):
            there = entry_of(other)
            assert here and there, (module, other)
            if there != here and there[0] == here[0]:
                found.add(f"{module} imports {other}, of the same row")
            elif there[0] > here[0]:
                found.add(f"{module} imports {other}, of a lower row")
    assert found == set()


def test_there_is_no_cycle() -> None:
    graph = {path.removesuffix(".py").replace("/", "."): own_imports(tree) for path, tree in TREES.items()}
    assert set(TopologicalSorter(graph).static_order()) == MODULES


def test_inits_are_empty() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()
    assert {path for path in ROOT.rglob("__init__.py") if path.read_text()} == set()


def test_names_say_what_is_inside() -> None:
    parts = {part for path in TREES for part in Path(path).with_suffix("").parts}
    assert parts & {"utils", "util", "common", "core", "base", "helpers", "misc"} == set()


@pytest.mark.parametrize("folder", ["framework", "tests", "tools"])
def test_files_have_at_most_400_lines(folder: str) -> None:
    files = (REPOSITORY / folder).rglob("*.py")
    assert {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 400} == {}


def test_functions_have_at_most_80_lines_and_6_positional_parameters() -> None:
    long, wide = {}, {}
    for path, tree in TREES.items():
        for function, bound in functions(tree):
            assert function.end_lineno is not None
            if (lines := function.end_lineno - function.lineno + 1) > 80:
                long[f"{path}:{function.name}"] = lines
            if (count := len(function.args.posonlyargs) + len(function.args.args) - bound) > 6:
                wide[f"{path}:{function.name}"] = count
    assert (long, wide) == ({}, {})


def test_signatures_are_annotated_and_pass_no_kwargs_through() -> None:
    bare, passed = set(), set()
    for path, tree in TREES.items():
        for function, bound in functions(tree):
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args][bound:] + arguments.kwonlyargs
            named += [arguments.vararg] if arguments.vararg else []
            if function.returns is None or any(argument.annotation is None for argument in named):
                bare.add(f"{path}:{function.lineno} {function.name}")
            if arguments.kwarg is not None:
                passed.add(f"{path}:{function.lineno} {function.name}")
    assert (bare, passed) == (set(), set())


def distributed_names(tree: ast.Module) -> set[str]:
    """What is named below torch.distributed, by whatever import."""
    prefix, aliases, found = "torch.distributed", {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.name + ".").startswith(prefix + "."):
                    aliases |= {alias.asname or prefix}
                    found |= {alias.name[len(prefix) + 1 :]} - {""}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
        elif isinstance(node, ast.ImportFrom) and ((node.module or "") + ".").startswith(prefix + "."):
            below = (node.module or "")[len(prefix) + 1 :]
            found |= {f"{below}.{alias.name}".lstrip(".") for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := chain(node)):
            found |= {name[len(alias) + 1 :] for alias in aliases if name.startswith(alias + ".")}
    return found


def test_the_names_below_torch_distributed_are_seen() -> None:
    texts = ("import torch.distributed as d; d.a()", "from torch import distributed as t; t.a()", "torch.distributed.a")
    assert all(distributed_names(ast.parse(text)) == {"a"} for text in texts)
    assert distributed_names(ast.parse("from torch.distributed import a\nfrom torch.distributed.b import c")) == {
        "a",
        "b.c",
    }


def test_torch_distributed_is_called_in_its_places_only() -> None:
    found = {
        f"{path} names torch.distributed.{name}"
        for path, tree in TREES.items()
        for name in distributed_names(tree)
        if not any(fnmatch(path, file) and fnmatch(name, names) for file, names in DISTRIBUTED)
    }
    assert sorted(found) == []


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("package", "places"), ONLY)
def test_a_package_is_imported_in_its_places_only(package: str, places: tuple[str, ...]) -> None:
    users = {path for path, tree in TREES.items() if any(is_within(name, package) for name in imported(tree))}
    assert {path for path in users if not any(fnmatch(path, place) for place in places)} == set()


def test_the_environment_is_read_in_one_file() -> None:
    users = set()
    for path, tree in TREES.items():
        names = {chain(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imported(tree))
        if any(re.match(r"os\.(environ|environb|getenv|getenvb|putenv|unsetenv)\b", name) for name in names):
            users.add(path)
    assert users == {"environment.py"}
