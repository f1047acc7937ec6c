"""The wheel holds the package and nothing else, and runs from wherever it is put."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import peft_bsr

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("peft_bsr", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "peft_bsr_cli.py"):
        shutil.copy(ROOT / name, folder / "source")
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_contents(wheel):
    assert wheel.name == f"peft_bsr-{peft_bsr.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"peft_bsr-{peft_bsr.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"peft_bsr", "peft_bsr_cli.py", info}, (
        "no tests, no benchmarks, no examples"
    )
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "peft_bsr").rglob("*.py")}
    assert sources <= names
    assert {"peft_bsr/py.typed", f"{info}/licenses/LICENSE", f"{info}/METADATA"} <= names
    assert {name for name in names if name.startswith("peft_bsr/")} - sources == {
        "peft_bsr/py.typed",
        "peft_bsr/app/benchmark.json",
    }


def test_it_runs_from_a_clean_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import peft_bsr, sys; from pathlib import Path\n"
        "from importlib.metadata import version\n"
        "assert Path(peft_bsr.__file__).is_relative_to(Path(sys.argv[1])), peft_bsr.__file__\n"
        "assert version('peft-bsr') == peft_bsr.__version__\n"
        "from peft import get_peft_model\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)\n"
        "print(get_peft_model(ViTForImageClassification(tiny), peft_bsr.BSRConfig()).base_model.plan().trained_blocks)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[3]"
