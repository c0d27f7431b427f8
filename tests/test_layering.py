"""The house: the package is a pipeline, its rooms have one name, and files and functions are short.

The package's docstring gives the order of its modules; imports respect it.
"""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import bitnet_jax

PACKAGE = Path(bitnet_jax.__file__).parent
ROOT = PACKAGE.parent
SCIENCE = ROOT / "experiments"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))
SOURCES = sorted([*PACKAGE.rglob("*.py"), *SCIENCE.rglob("*.py")])
FILE_LINES, FUNCTION_LINES, QUESTION_LINES = 400, 45, 200
README_LINES, README_WIDTH = 160, 300


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


def functions(path: Path):
    """Pairs of `file:function` and its lines of code, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            yield f"{path.name}:{node.name}", node.end_lineno - node.lineno + 1 - doc


def test_the_docstring_orders_every_module_once():
    assert sorted(documented_order()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module):
    order = documented_order()
    assert siblings(module) <= set(order[: order.index(module)])


def test_the_walk_sees_imports_that_exist():
    """Guards the tests above and below: a walk that found nothing would pass them."""
    assert siblings("model") == {"config", "fields", "products", "quant", "sharding"}
    assert {"optim", "loss", "model"} <= siblings("train")
    assert len(SOURCES) > 50 and dict(functions(PACKAGE / "quant.py"))["quant.py:divide"] == 2


def test_the_package_imports_neither_what_uses_it_nor_its_commands():
    """Commands are the last layer: only they, and experiments, import `bitnet_jax.cli`."""
    for path in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots.isdisjoint({"experiments", "tests", "pytest"}), path
    inner = {name for module in MODULES for name in imported(PACKAGE / f"{module}.py")}
    assert not {name for name in inner if name.startswith("bitnet_jax.cli")}


def test_no_room_has_the_name_of_another():
    """Commands aside, which are named after the module that they call."""
    rooms = [path.name for path in SOURCES if path.parent.name != "cli" and path.stem[:2] != "__"]
    assert [name for name, n in Counter(rooms).items() if n > 1] == []


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: n for path, n in lengths.items() if n > FILE_LINES} == {}
    questions = {path: n for path, n in lengths.items() if len(path.parts) == 2}
    questions = {p: n for p, n in questions.items() if p.parts[0] == "experiments"}
    long = {p: n for p, n in questions.items() if n > QUESTION_LINES and p.stem[:5] != "bench"}
    assert long == {}


def test_functions_are_short():
    lengths = [function for path in SOURCES for function in functions(path)]
    assert [function for function in lengths if function[1] > FUNCTION_LINES] == []


def test_readme_is_short():
    text_lines = (ROOT / "README.md").read_text().splitlines()
    assert len(text_lines) <= README_LINES
    assert [n for n, line in enumerate(text_lines, 1) if len(line) > README_WIDTH] == []


def test_the_top_level_holds_what_the_design_names():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the top level may hold anything")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    known = {"bitnet_jax", "experiments", "tests", "Makefile", "requirements.txt", "README.md"}
    assert {name for name in top if name[0] != "."} == known | {"LICENSE", "pyproject.toml"}
