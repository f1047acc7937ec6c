"""Every warning and every class of error has an entry in docs/troubleshooting.md whose title is its message."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from pathlib import Path

import pytest

import peft_bsr
from peft_bsr import errors

ROOT = Path(peft_bsr.__file__).parent
PAGE = (ROOT.parent / "docs" / "troubleshooting.md").read_text()
TITLES = re.findall(r"^### (.*)$", PAGE, flags=re.M)
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def texts_of(node: ast.AST) -> str:
    """All literal text in an expression, … between the parts."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "…".join(texts_of(child) for child in ast.iter_child_nodes(node))


def calls(name: str) -> list[ast.Call]:
    found = (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in found if ast.unparse(call.func) == name]


SOURCE = re.sub(r"\s+", " ", " ".join(texts_of(tree) for tree in TREES.values()))


@pytest.mark.parametrize("title", [title for title in TITLES if not title.startswith(("KeyError", "Cannot combine"))])
def test_titles_are_messages_of_the_package(title):
    parts = [part.strip(" .;:,") for part in title.split("…")]
    assert all(part in SOURCE for part in parts if len(part) > 3), title


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_class_has_an_entry(error):
    is_root = error in (errors.PeftBsrError, errors.PeftBsrWarning)
    assert issubclass(error, (errors.PeftBsrError, errors.PeftBsrWarning))
    assert f"`{error.__name__}`" in PAGE if is_root else re.search(rf"^### .*\n\n`{error.__name__}`\.", PAGE, re.M)
    assert error.__name__ in peft_bsr.__all__


@pytest.mark.parametrize(
    "call",
    [c for c in calls("warnings.warn") if "DeprecationWarning" not in ast.unparse(c)],
    ids=lambda call: f"line-{call.lineno}",
)
def test_warnings_are_of_our_classes_and_have_an_entry(call):
    assert ast.unparse(call.args[1]) in {c.__name__ for c in CLASSES}
    message = re.sub(r"…+", "…", texts_of(call.args[0]))
    parts = [[part.strip() for part in title.split("…")] for title in TITLES]
    assert any(all(part in message for part in title) for title in parts), message


def test_what_is_raised_is_of_our_classes():
    allowed = {c.__name__ for c in CLASSES} | {
        "NotImplementedError",
        "AttributeError",
        "StopForwardError",
        "NotLeanError",
        "MissingEstimateError",
    }
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).removesuffix(".from_problems")
                if name not in allowed and not name.startswith("_"):
                    found[f"{path.relative_to(ROOT)}:{node.lineno}"] = name
    inner = {place: name for place, name in found.items() if place.startswith("training/cache_files.py")}
    assert found.keys() == inner.keys(), found  # that one is caught where it is raised


def test_there_is_one_name_for_logs():
    kept = [node.value for tree in TREES.values() for node in tree.body if isinstance(node, ast.Assign)]
    own = [call for call in calls("logging.getLogger") if call in kept]
    assert own and {ast.unparse(call) for call in own} == {"logging.getLogger(__name__)"}
    logging_ones = {
        ast.unparse(call.func.value) for call in ast.walk(ast.Module([*TREES.values()], [])) if is_log(call)
    }
    assert logging_ones == {"logger"}
    names = [name for name in logging.root.manager.loggerDict if "bsr" in name]
    assert names and all(name.split(".")[0] == "peft_bsr" for name in names)


def is_log(node: ast.AST) -> bool:
    """Whether it is a call such as `logger.info(...)`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("debug", "info", "warning", "error", "exception")
    )
