"""What is answered before torch is imported."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import peft_bsr

ROOT = Path(peft_bsr.__file__).parents[1]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["dance"], []], ids=str)
def test_torch_is_not_imported(arguments):
    code = (
        "import sys, peft_bsr_cli\n"
        f"code = peft_bsr_cli.main({arguments})\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'yaml', 'peft_bsr'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == (0 if arguments and arguments[0].startswith("--") else 2), result.stderr
    if arguments == ["--help"]:
        assert "peft-bsr inspect google/vit-base-patch16-224" in result.stdout


@pytest.mark.parametrize("module", ["peft_bsr", "peft_bsr.cli"])
def test_it_runs_as_a_module(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    assert left.value.code == 0 and "usage: peft-bsr" in capsys.readouterr().out


def test_the_console_script_is_the_light_module():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'peft-bsr = "peft_bsr_cli:main"' in text
    assert 'py-modules = ["peft_bsr_cli"]' in text
