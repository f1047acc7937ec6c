"""Tiny random models, one for each supported family."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **kw: ViTForImageClassification(ViTConfig(**SIZES, num_labels=3, **kw)),
    "vit_bare": lambda **kw: ViTModel(ViTConfig(**SIZES, **kw)),
    "deit": lambda **kw: DeiTForImageClassification(DeiTConfig(**SIZES, num_labels=3, **kw)),
    "deit_teacher": lambda **kw: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=3, **kw)),
    "vit_msn": lambda **kw: ViTMSNForImageClassification(ViTMSNConfig(**SIZES, num_labels=3, **kw)),
    "dinov2": lambda **kw: Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2, num_labels=3, **kw)),
    "dinov2_registers": lambda **kw: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3, num_labels=3, **kw)
    ),
    "clip": lambda **kw: CLIPForImageClassification(
        CLIPConfig(vision_config={**SIZES, **kw}, text_config=TEXT, num_labels=3)
    ),
    "clip_bare": lambda **kw: CLIPVisionModel(CLIPVisionConfig(**SIZES, **kw)),
}


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through half a million objects each time."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts of each family, that is of each folder."""
    kinds = ("passed", "failed", "error", "skipped")
    found = Counter((_family(r.nodeid), kind) for kind in kinds for r in terminalreporter.stats.get(kind, ()))
    terminalreporter.section("families")
    for family in sorted({family for family, _ in found}):
        counts = [f"{found[family, kind]} {kind}" for kind in kinds if found[family, kind]]
        terminalreporter.write_line(f"{family}: {', '.join(counts)}")


def _family(nodeid: str) -> str:
    folder, name, *_ = nodeid.partition("::")[0].split("/")
    return name.removesuffix(".py") if folder == "tests" else "docstrings"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.sampled(n)`: all but every n-th case are slow tests; the first depends on the test's name."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, found in cases.items():
        (n,) = found[0].get_closest_marker("sampled").args
        first = crc32(test.encode()) % min(n, len(found))
        for place, item in enumerate(found):
            if place % n != first:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """No test sees what one before it left: Accelerate's first precision and processes, torch's random numbers."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """`make_model("vit")`: a tiny model of that family, always with the same weights, in evaluation mode."""

    def make(family: str = "vit", seed: int = 0, **config: object) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = FAMILIES[family](**config)
            for name, parameter in model.named_parameters():
                if "lambda1" in name:  # LayerScale starts at one; trained ones do not stay there
                    nn.init.uniform_(parameter, 0.5, 1.5)
        return model.eval()

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Two random images [2, 3, 32, 32]."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return request.param


def primary_output(output: object) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits
