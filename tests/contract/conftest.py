"""Makes the modules of this folder importable by name; fixtures for the methods in the tests of PEFT's behaviour."""

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


# Full weights without reductions and LoRA with reductions run by default; the other two combinations are slow tests
SELDOM = ("bsr_full_reduced", "bsr_lora", "synqt")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in SELDOM else ()) for name in METHODS])
def method(request: pytest.FixtureRequest) -> Method:
    """Each method in turn."""
    return METHODS[request.param]


@pytest.fixture
def model(method: Method, make_vit: Callable) -> PeftModel:
    return method.attach(make_vit())
