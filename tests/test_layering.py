"""The package is a pipeline: its docstring gives the order of modules, and imports respect it."""

import ast
import re
from pathlib import Path

import pytest

import bitnet_jax

PACKAGE = Path(bitnet_jax.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def documented_order() -> list[str]:
    """Module names of the arrow chain `config -> ... -> run` in the package's docstring."""
    return re.findall(r"\w+", re.search(r"\w+(\s*->\s*\w+)+", bitnet_jax.__doc__)[0])


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(module: str) -> set[str]:
    """Modules of the package that `module` imports."""
    names = imported(PACKAGE / f"{module}.py")
    return {name.split(".")[1] for name in names if name.startswith("bitnet_jax.")} & set(MODULES)


def test_the_docstring_orders_every_module_once():
    assert sorted(documented_order()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module):
    order = documented_order()
    assert siblings(module) <= set(order[: order.index(module)])


def test_the_walk_sees_imports_that_exist():
    """Guards the test above: an AST walk that found nothing would pass it."""
    assert siblings("model") == {"config", "quant"}
    assert {"data", "optim", "loss", "model"} <= siblings("train")


def test_the_package_does_not_import_what_uses_it():
    """Nor is there a sub-package that the checks here would not see."""
    paths = [*PACKAGE.rglob("*.py")]
    roots = {name.split(".")[0] for path in paths for name in imported(path)}
    assert roots.isdisjoint({"experiments", "tests", "pytest"})
    assert {path.parent for path in paths} == {PACKAGE}


def test_modules_and_package_stay_small():
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    assert {name: n for name, n in lines.items() if n > 400} == {}
    assert sum(lines.values()) < 5400
