from __future__ import annotations

import copy
import enum
import importlib
import pickle
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from peft import PeftConfig
from peft.utils import PeftType

import peft_bsr
from peft_bsr.compat.peft_api import extend_peft_type
from peft_bsr.errors import UnsupportedPeftError
from peft_bsr.registration import SUPPORTED, check_peft_version


def test_the_member_is_like_any_other():
    member = PeftType.BSR
    assert isinstance(member, PeftType)
    assert isinstance(member, enum.Enum)
    assert (member.name, member.value, str(member.value)) == ("BSR", "BSR", "BSR")
    assert PeftType("BSR") is PeftType["BSR"] is member
    assert member in PeftType
    assert "BSR" in list(PeftType)
    assert member == "BSR"


def test_copies_and_pickles_are_the_same_member():
    assert copy.deepcopy(PeftType.BSR) is PeftType.BSR
    assert pickle.loads(pickle.dumps(PeftType.BSR)) is PeftType.BSR


def test_extending_again_changes_nothing():
    before = list(PeftType)
    assert extend_peft_type("BSR") is PeftType.BSR
    assert list(PeftType) == before
    assert len(before) == len(set(before))


def test_importing_again_registers_again():
    importlib.reload(peft_bsr.tuners.bsr)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BSR] is peft_bsr.BSRConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BSR] is peft_bsr.BSRModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.BSR] == "bsr_"


def test_a_saved_config_comes_back_as_ours(tmp_path):
    config = peft_bsr.BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1, 2], keep_rate=[0.5, 0.7])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is peft_bsr.BSRConfig
    loaded.inference_mode, loaded.peft_version = config.inference_mode, config.peft_version
    assert loaded == config


def test_too_old_a_peft_is_refused():
    with pytest.raises(UnsupportedPeftError, match=r"needs peft >= 0\.20\.0, found 0\.19\.1"):
        check_peft_version("0.19.1")
    check_peft_version("0.20.0")


@pytest.mark.parametrize("package", SUPPORTED)
def test_a_newer_version_than_tested_is_noticed(package):
    found, (oldest, first_untested) = Version(version(package)), SUPPORTED[package]
    assert Version(oldest) <= found < Version(first_untested), (
        f"{package} {found} is newer than what was tested. Run the tests on it, tests/compat first, then raise "
        "SUPPORTED, the pins in pyproject.toml and the rows of tests/contract/versions.py."
    )


@pytest.mark.parametrize("package", SUPPORTED)
def test_pyproject_pins_the_same_range(package):
    """Of the file, not of what is installed: an editable install keeps the pins it was made with."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (pin,) = (Requirement(line) for line in re.findall(rf'^    "({package}\b.*)",$', project, re.MULTILINE))
    oldest, first_untested = SUPPORTED[package]
    major, minor, *_ = Version(oldest).release
    assert oldest in pin.specifier and f"{major}.{minor - 1}.99" not in pin.specifier
    major, minor, *_ = Version(first_untested).release
    assert first_untested not in pin.specifier and f"{major}.{minor - 1}.99" in pin.specifier


def test_importing_registers_and_needs_no_torchvision():
    code = "import sys, peft_bsr; from peft.utils import PeftType; PeftType.BSR\n"
    code += "sys.exit(any(m.split('.')[0] in ('torchvision', 'timm') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
