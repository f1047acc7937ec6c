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


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    """Each method in turn."""
    return METHODS[request.param]


@pytest.fixture
def model(method: Method, make_vit: Callable) -> PeftModel:
    return method.attach(make_vit())
