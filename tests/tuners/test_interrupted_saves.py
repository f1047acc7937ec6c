"""A save that is killed, or finds the disk full, leaves the adapter that was there before."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

from peft_bsr import AdapterFileError, ALaSTConfig, BSRConfig, SynQTConfig, check_adapter

CONFIGS = [BSRConfig(trainable_blocks=[1, 3]), ALaSTConfig(), SynQTConfig()]


@pytest.fixture(params=CONFIGS, ids=lambda config: type(config).__name__)
def adapter(request: pytest.FixtureRequest, make_vit) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(make_vit(), request.param).eval()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more than `size` bytes into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def grow(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(1.0)


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_a_full_disk_is_told_and_the_earlier_adapter_loads(adapter, make_vit, images, run, tmp_path):
    adapter.save_pretrained(tmp_path)
    expected = run(adapter, images)
    grow(adapter)
    with file_size_limit(12_000), pytest.raises((OSError, SafetensorError), match=r"File too large|No space"):
        adapter.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), expected)
    assert not leftovers(tmp_path)


def test_a_configuration_that_cannot_be_written(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    config = adapter.peft_config["default"]
    with file_size_limit(10), pytest.raises(AdapterFileError, match=r"was not written \(.*File too large"):
        config.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert not leftovers(tmp_path)


def test_files_are_replaced_not_written_over(adapter, tmp_path):
    """Who has the earlier file open, or is interrupted, keeps it whole."""
    adapter.save_pretrained(tmp_path)
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        os.link(tmp_path / name, tmp_path / f"earlier-{name}")
    before = [(tmp_path / name).read_bytes() for name in names]
    grow(adapter)
    adapter.peft_config["default"].revision = "another"
    adapter.save_pretrained(tmp_path)
    assert [(tmp_path / f"earlier-{name}").read_bytes() for name in names] == before
    assert all((tmp_path / name).read_bytes() != content for name, content in zip(names, before, strict=True))


@pytest.mark.dist
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_any_moment(adapter, make_vit, images, run, tmp_path):
    adapter.save_pretrained(tmp_path)
    chance = random.Random(0)
    for _ in range(20):
        child = os.fork()
        if not child:
            while True:  # until it is killed
                grow(adapter)
                adapter.save_pretrained(tmp_path)
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            check_adapter(tmp_path)
        except AdapterFileError as error:  # killed between the two files
            assert "was not saved together with the adapter_config.json next to it" in str(error)
        else:
            assert run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images).isfinite().all()
    adapter.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    assert not leftovers(tmp_path)
