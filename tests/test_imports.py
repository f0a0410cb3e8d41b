"""Check that each module imports only modules before it, and nothing heavy before it is needed."""

import ast
import re

import pytest
from conftest import ROOT

# In reading order, as the README lists them.
MODULES = re.findall(r"^\| `(\w+)\.py` \| \d+ \|", (ROOT / "README.md").read_text(), re.MULTILINE)
OTHERS = {"imagecodecs", "lmdb", "matplotlib", "numpy", "PIL", "scipy", "skimage", "tensorflow", "tifffile"}
AT_ONCE = {"cli": set(), "lmdb_utils": {"numpy", "lmdb"}, "unet_model": {"numpy", "tensorflow"}}


def imports_of(node):
    """Yield the modules that some code imports, and whether each import is outside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], True) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.partition(".")[0], True
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.Lambda))
            yield from ((name, at_once and not inside) for name, at_once in imports_of(child))


def test_every_module_is_in_the_order_of_reading():
    assert sorted(MODULES) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_those_before_it_and_nothing_heavy_at_once(module):
    found = list(imports_of(ast.parse((ROOT / f"{module}.py").read_text())))
    before = MODULES[: MODULES.index(module)]
    assert {name for name, _ in found} & set(MODULES) <= set(before)
    assert {name for name, at_once in found if at_once} & OTHERS <= AT_ONCE.get(module, {"numpy"})


def test_the_build_never_imports_tensorflow():
    for module in ("cli", "lmdb_utils", "image_files", "build_lmdb"):
        assert "tensorflow" not in dict(imports_of(ast.parse((ROOT / f"{module}.py").read_text())))
