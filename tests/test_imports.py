"""Imports run inwards only: core <- ops <- backbones <- engine <- tuners <- everything a user looks at."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import peft_bsr

ROOT = Path(peft_bsr.__file__).parent
LAYERS = [
    "errors",
    "problem_type",
    "core",
    "ops",
    "backbones",
    "engine",
    "selftest",
    "registration",
    "multitask",
    "tuners",
    "data",
    "training",
    "cost",
    "viz",
    "hub",
]
LAYERS += ["report", "exporting", "prediction", "cli"]  # what a user looks at
OUTSIDE = {
    "core": {"torch"},
    "ops": {"torch"},
    "backbones": {"torch", "transformers"},
    "engine": {"torch"},
    "selftest": {"torch"},
}
STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "dataclasses",
    "functools",
    "gc",
    "inspect",
    "logging",
    "math",
    "operator",
    "os",
    "random",
    "sys",
    "tempfile",
    "threading",
    "typing",
    "warnings",
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_inwards(path):
    layer = path.relative_to(ROOT).parts[0]
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "peft_bsr":
            assert len(parts) > 1, f"{path} imports the whole package"
            assert LAYERS.index(parts[1]) <= LAYERS.index(layer), f"{layer} must not import {module}"
        elif layer in OUTSIDE:
            assert parts[0] in OUTSIDE[layer] | STANDARD, f"{layer} must not import {module}"


SHARED = {"base", "blocks"}  # of tuners, no methods
METHODS = {
    path.name for path in (ROOT / "tuners").iterdir() if path.is_dir() and not path.name.startswith("_")
} - SHARED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_methods_are_known_to_nobody_but_themselves(path):
    """A method's files import no other method; what methods share, and everything above them, imports none."""
    parts = path.relative_to(ROOT).parts
    own = parts[1] if parts[0] == "tuners" and len(parts) > 2 else None
    if parts == ("tuners", "__init__.py"):
        return  # the list of public names
    for module in imports_of(path):
        named = module.removeprefix("peft_bsr.tuners.").partition(".")[0]
        if module.startswith("peft_bsr.tuners.") and named in METHODS:
            assert named == own, f"{path} imports {module}: ask `peft_bsr.tuners` or a MethodInfo"


def test_no_method_is_asked_for_by_its_name():
    """Outside of `tuners`, names of methods are in documentation alone."""
    found = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "tuners":
            continue
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        if bad := {name for name in names if re.match("ALaST|SynQT", name)} | (
            words & {"alast", "synqt", "ALAST", "SYNQT"}
        ):
            found[str(path.relative_to(ROOT))] = bad
    assert not found


def test_public_names_are_sorted_and_exist():
    assert sorted(peft_bsr.__all__) == peft_bsr.__all__
    assert all(hasattr(peft_bsr, name) for name in peft_bsr.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 350


# files of the engine and the probe, which are to get other names
HIDDEN = {"peft_bsr.backbones.probe", "peft_bsr.engine.record_scores"}
HIDDEN |= {f"peft_bsr.engine.verify_{part}" for part in ("lean", "mixture", "queries")}


def test_no_name_hides_a_module_of_its_package():
    """Else `peft_bsr.hub.load` is a function, and `peft_bsr.hub.load.read_config` an AttributeError."""
    folders = [path.parent.relative_to(ROOT.parent) for path in ROOT.rglob("__init__.py")]
    packages = [importlib.import_module(".".join(folder.parts)) for folder in folders]
    hidden = {
        f"{package.__name__}.{module.name}"
        for package in packages
        for module in pkgutil.iter_modules(package.__path__)
        if not isinstance(vars(package).get(module.name, peft_bsr), ModuleType)
    }
    assert hidden <= HIDDEN
