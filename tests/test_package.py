"""The house: files and functions that fit a screen or two, and imports that run one way."""

import ast
import pathlib

import mtlbalance

PACKAGE = pathlib.Path(mtlbalance.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a file imports what stands on a lower floor, or in its own folder.
FLOORS = [
    ["annotations", "calls", "complex_parts", "decompositions", "meshes"],
    ["hyperparameters", "numerics"],
    ["mapped_axes", "parameters", "states"],
    ["losses", "strides"],
    ["names"],
    ["constraints"],
    ["gramian", "contract", "solvers"],
    ["memo", "restored", "returned", "state_checks"],
    ["given"],
    ["boundary"],
    ["base", "changed_tasks"],
    ["scalarization", "aggregation"],
    ["references", "registry", "wrappers", "weights"],
    ["autodiff", "transforms"],
    ["diagnostics", "project_update"],
    ["__init__"],
]
# A wrapper that is a published method, and has its public name among the aggregators.
LISTED_BELOW = ["wrappers", "cr_mogm"]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def room(path):
    """The module or folder of the package in which a file is."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The modules of the package that a file imports, as ``["autodiff", "point"]``; the public names are no room."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("mtlbalance.")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mtlbalance":
            inside = node.module.split(".")[1:]
            yield from [inside] if inside else [[alias.name] for alias in node.names]


def code_lines(function, lines):
    """The lines of a function that are neither empty nor its docstring."""
    first, *_ = function.body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = range(first.lineno, first.end_lineno + 1) if is_docstring else ()
    numbers = range(function.lineno, function.end_lineno + 1)
    return sum(bool(lines[n - 1].strip()) for n in numbers if n not in docstring)


def test_files_and_functions_are_short():
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 350, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert code_lines(node, lines) <= 60, (path, node.name, code_lines(node, lines))


def test_imports_run_one_way():
    assert {room(path) for path in FILES} == FLOOR.keys()
    for path in FILES:
        for module in imported(path):
            beside = module[0] == room(path) or (module == LISTED_BELOW and path.stem == "__init__")
            assert beside or FLOOR[module[0]] < FLOOR[room(path)], (path, module)


def test_no_method_imports_another():
    for path in FILES:
        if room(path) in ("scalarization", "aggregation") and path.stem != "__init__":
            assert not [m for m in imported(path) if m[0] in ("scalarization", "aggregation")], path
