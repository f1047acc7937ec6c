"""The contract's own modules are imported by name; fixtures of the methods that PEFT's contract is checked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from tests.tuners.conftest import assert_unchanged, images, make_vit, run, snapshot

sys.path.insert(0, str(Path(__file__).parent))
from methods import METHODS, Method

__all__ = ["assert_unchanged", "images", "make_vit", "run", "snapshot"]


# Whole weights without reductions and low-rank updates with them: the other two of the four run with the slow tests
SELDOM = ("bsr_full_reduced", "bsr_lora", "synqt")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in SELDOM else ()) for name in METHODS])
def method(request: pytest.FixtureRequest) -> Method:
    """Each method in turn."""
    return METHODS[request.param]


@pytest.fixture
def model(method: Method, make_vit: Callable) -> PeftModel:
    return method.attach(make_vit())
