"""Run the tests of timm models in an environment of their own: `make test-timm`.

timm imports torchvision, and the torchvision that pip finds for a CPU build of torch can be one for CUDA. Its compiled
operators do not load there, `import torchvision` fails, and with it transformers' image processors. So neither goes
into the main environment. This one has its packages, timm, and the torchvision for its torch. If that does not import,
its compiled operators (boxes, regions of interest: nothing that timm or transformers' image processors call) are
declared without an implementation in this environment's copy; the rest is the real one, and its version says so.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/contract/test_timm.py",)
WITHOUT_OPERATORS = "without.operators"
_DECLARED = """
import torch as _torch
for _name in {names!r}:
    _torch.library.define(_name, "(Tensor values) -> Tensor")
"""


def main() -> int:
    """Make the environment if it is not there, and run the tests in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-timm", help="default: .venv-timm")
    args, pytest_arguments = parser.parse_known_args()
    python = make_environment(args.environment.absolute())
    print(f"timm {_ask(python, 'timm')}, torchvision {_ask(python, 'torchvision')}", flush=True)
    return subprocess.call([str(python), "-m", "pytest", "-n0", *TESTS, *pytest_arguments], cwd=ROOT)


def make_environment(folder: Path) -> Path:
    """Make a virtual environment with this one's packages, timm and a torchvision that imports.

    Returns:
        Its Python.

    Raises:
        SystemExit: If pip finds no timm or no torchvision for the installed torch, or if a broken one is installed.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    done = folder / "installed"
    made_for = f"{sys.prefix} torch {version('torch')}"
    if done.exists() and done.read_text() == made_for:
        return python
    venv.create(folder, clear=True, with_pip=True)
    (packages / "main_environment.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    # torch is there already; naming it makes pip choose the torchvision that was built for it
    pip = [str(python), "-m", "pip", "install", "--quiet", "timm", "torchvision", f"torch=={version('torch')}"]
    if subprocess.call(pip):
        raise SystemExit(f"pip found no timm, or no torchvision for torch {version('torch')}; see its message above")
    if _ask(python, "torchvision") is None:
        if not (packages / "torchvision").is_dir():
            raise SystemExit(f"the torchvision of {sys.prefix} does not import; uninstall it there and run this again")
        declare_operators(packages / "torchvision")
    if _ask(python, "timm") is None:
        raise SystemExit(f"timm does not import: run `{python} -c 'import timm'`")
    done.write_text(made_for)
    return python


def declare_operators(torchvision: Path) -> None:
    """Let a torchvision import whose compiled operators do not load; calling one of them is still an error."""
    source = (torchvision / "_meta_registrations.py").read_text()
    registered = re.findall(r'register_fake\("(torchvision::\w+)"\)', source)
    with (torchvision / "extension.py").open("a") as file:
        file.write(_DECLARED.format(names=registered))
    with (torchvision / "version.py").open("a") as file:
        file.write(f'\n__version__ += ("." if "+" in __version__ else "+") + "{WITHOUT_OPERATORS}"\n')


def _ask(python: Path, package: str) -> str | None:
    """The version of a package that imports, else None."""
    code = f"import {package}; print({package}.__version__)"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
