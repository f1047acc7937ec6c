"""Imports run inwards only: core <- ops <- backbones <- engine <- tuners <- everything a user looks at."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

import peft_bsr

ROOT = Path(peft_bsr.__file__).parent
LAYERS = [
    "errors",
    "deprecation",
    "problem_type",
    "compat",
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
RANKS = {layer: rank for rank, layer in enumerate(LAYERS)} | {"app": LAYERS.index("cli")}  # the app is beside the cli
OUTSIDE = {
    "compat": {"torch", "transformers", "peft"},
    "core": {"torch"},
    "ops": {"torch"},
    "backbones": {"torch", "transformers"},
    "engine": {"torch"},
    "selftest": {"torch"},
}
COMPAT = {  # which of its files the inner layers may ask; each outer one may ask them all
    "core": {"torch_api"},
    "ops": {"torch_api"},
    "backbones": {"torch_api", "transformers_api"},
    "engine": {"torch_api", "transformers_api"},
    "selftest": {"torch_api", "transformers_api"},
}
STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "dataclasses",
    "difflib",
    "functools",
    "gc",
    "hashlib",
    "inspect",
    "itertools",
    "logging",
    "math",
    "operator",
    "os",
    "random",
    "re",
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
            assert RANKS[parts[1]] <= RANKS[layer], f"{layer} must not import {module}"
            if parts[1] == "compat" and layer in COMPAT:
                assert parts[2] in COMPAT[layer], f"{layer} must not import {module}"
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


# Only peft_bsr/compat touches what peft, transformers and torch call private
LIBRARIES = ("peft", "transformers", "torch")
# modules that no documentation names, and of those that one does, what it names
PRIVATE = (
    "peft.mapping",
    "peft.utils.other",
    "torch.multiprocessing.reductions",
    "transformers.modeling_utils",
    "transformers.models",
    "transformers.pipelines",
    "transformers.utils.output_capturing",
)
PUBLIC = {
    "peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer"},
    "torch.utils.flop_counter": {"FlopCounterMode"},
}
OBJECTS = (
    nn.Module(),
    nn.Parameter(torch.zeros(1)),
    torch.zeros(1).untyped_storage(),
    torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
    transformers.PreTrainedConfig(),
    transformers.PreTrainedModel,
    transformers.modeling_layers.GradientCheckpointingLayer,
    BaseTuner,
    BaseTunerLayer,
    peft.PeftModel,
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


FOREIGN = {name for thing in OBJECTS for name in (*dir(thing), *getattr(thing, "__dict__", ())) if is_private(name)}
FOREIGN |= {"_gradient_checkpointing_func", "_disable_adapters", "_active_adapter", "_name_or_path"}


def own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that the package gives to things of its own."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_own(node)}


def is_own(node: ast.Attribute) -> bool:
    """Whether it is asked of the object itself: the class, a subclass of the library's, may."""
    place = node.value
    is_super = isinstance(place, ast.Call) and isinstance(place.func, ast.Name) and place.func.id == "super"
    return is_super or (isinstance(place, ast.Name) and place.id in ("self", "cls"))


def touched(tree: ast.AST, own: set[str]) -> list[str]:
    """What of the libraries' private things a file touches."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if is_private_module(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            allowed = PUBLIC.get(node.module or "")
            for name in (alias.name for alias in node.names):
                is_hidden = is_private_module(f"{node.module}.{name}") or (allowed is not None and name not in allowed)
                found += [f"{node.module}.{name}"] if is_hidden else []
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node):
            found += [node.attr] if node.attr in FOREIGN or node.attr not in own else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FOREIGN:
            found.append(node.value)
    return found


def is_private_module(name: str) -> bool:
    parts = name.split(".")
    is_listed = any(f"{name}.".startswith(f"{private}.") for private in PRIVATE)
    return parts[0] in LIBRARIES and (is_listed or any(map(is_private, parts)))


TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py")) if path.parent.name != "compat"}
OWN = own_names(list(TREES.values()))


def test_only_compat_touches_what_is_private():
    found = {str(path.relative_to(ROOT)): names for path, tree in TREES.items() if (names := touched(tree, OWN))}
    assert not found, f"put each behind a name in peft_bsr/compat: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "from torch.utils._pytree import tree_leaves",
        "import torch._dynamo.config",
        "from peft.tuners.tuners_utils import _ExcludedModule",
        "from peft.tuners.tuners_utils import check_adapters_to_merge",
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING",
        "from peft import mapping",
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS",
        "torch._functorch.config.activation_memory_budget",
        "tensor.untyped_storage()._cdata",
        "module._modules",
        "getattr(config, '_attn_implementation')",
        "layer._disable_adapters = True",
    ],
)
def test_the_rule_sees_each_way(line):
    assert touched(ast.parse(line), OWN)


def test_the_rule_leaves_the_own_alone():
    lines = (
        "self._modules[name]; super()._apply(run); controller._bound; from peft.tuners.tuners_utils import BaseTuner"
    )
    assert not touched(ast.parse(lines), OWN)
