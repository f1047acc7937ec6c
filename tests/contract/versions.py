"""Run the contract on the oldest and newest versions of torch, transformers and peft: `make compatibility`.

    python tests/contract/versions.py [--folder FOLDER] [--only N ...] [--tests ...]

Creates one virtual environment for each torch version in FOLDER, and folders with the other versions that come first on
the path. Existing ones are used again. Writes the table at the end of docs/compatibility.md. Needs several gigabytes:
older torch comes with CUDA.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from report import PAGE, VERSIONS, write_page

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/test_registration.py",
    "tests/contract/test_peft_conformance.py",
    "tests/contract/test_peft_conformance_use.py",
    "tests/contract/test_contract.py",
    "-k=test_registration or bsr_full_reduced or alast or synqt_reduced or (test_contract and vit and not up_to_date)",
)
PACKAGES = ("accelerate", "numpy", "packaging", "pillow", "pytest", "pytest-xdist", "safetensors", "tqdm")


@dataclass(frozen=True)
class Versions:
    """One row of the table.

    Attributes:
        torch: Version of torch.
        transformers: Version of transformers.
        peft: Version of peft.
        is_supported: Whether the package's requirements allow these versions.
    """

    torch: str
    transformers: str
    peft: str
    is_supported: bool = True


def rows() -> list[Versions]:
    """The versions of constraints.txt, each oldest one alone, all oldest together, a newer torch, unsupported ones."""
    pins = dict(re.findall(r"^(torch|transformers|peft)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    torch, transformers, peft = pins["torch"], pins["transformers"], pins["peft"]
    return [
        Versions(torch, transformers, peft),
        Versions(torch, transformers, "0.20.0"),
        Versions(torch, "5.18.0", peft),
        Versions("2.7.1", transformers, peft),
        Versions("2.7.1", "5.18.0", "0.20.0"),
        Versions("2.14.1", transformers, peft),
        Versions("2.6.0", transformers, peft, is_supported=False),
        Versions(torch, "5.0.0", "0.20.0", is_supported=False),
        Versions(torch, "5.24.0", peft, is_supported=False),
    ]


def pip(python: Path | str, *words: str) -> None:
    """Run a quiet `pip install`."""
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)


def environment(folder: Path, versions: Versions) -> tuple[Path, list[Path]]:
    """The Python interpreter with the row's torch, and the folders with its transformers and peft."""
    venv = folder / f"torch-{versions.torch}"
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip(python, f"torch=={versions.torch}")
        with TemporaryDirectory() as scratch:
            pins = [p for p in (ROOT / "constraints.txt").read_text().splitlines() if not p.startswith("torch==")]
            (constraints := Path(scratch) / "constraints.txt").write_text("\n".join(pins))
            pip(python, "--constraint", str(constraints), *PACKAGES, "transformers", "peft")
    extra = []
    for name, version in (("transformers", versions.transformers), ("peft", versions.peft)):
        place = folder / f"{name}-{version}"
        if not place.exists():  # peft needs torch, which the environment has; transformers its own huggingface_hub
            alone = ("--no-deps",) if name == "peft" else ()
            pip(python, *alone, "--target", str(place), f"{name}=={version}")
        extra.append(place)
    return python, extra


def run_row(folder: Path, versions: Versions, tests: Iterable[str]) -> str:
    """A summary of the test results on these versions."""
    try:
        python, extra = environment(folder, versions)
    except subprocess.CalledProcessError as error:
        return f"cannot be installed ({' '.join(error.cmd[-2:])})"
    paths = os.pathsep.join(map(str, [*extra, ROOT]))
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        words = ["-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *tests]
        found = "import torch, transformers, peft; print(torch.__version__, transformers.__version__, peft.__version__)"
        settings = {"env": os.environ | {"PYTHONPATH": paths}, "cwd": ROOT, "text": True, "check": False}
        imported = subprocess.run([str(python), "-c", found], capture_output=True, **settings)
        print(versions, imported.stdout.strip() or imported.stderr[-500:], flush=True)
        subprocess.run([str(python), *words], **settings)
        if not report.exists():
            return "the tests do not start"
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
        total, bad, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "skipped"))
        bad += int(suite.get("errors", 0))
        broken = sorted({case.get("name", "").partition("[")[0] for case in suite.iter("testcase") if _is_bad(case)})
    passed = f"{total - bad - skipped} passed" + (f", {skipped} skipped" if skipped else "")
    return (
        passed if not bad else f"{passed}, **{bad} FAIL** ({', '.join(broken[:6])}{', ...' if len(broken) > 6 else ''})"
    )


def _is_bad(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def main() -> int:
    """Run all rows and write the table. Returns 1 if a supported row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "versions", help="default .venv/versions")
    parser.add_argument("--only", type=int, nargs="*", help="indices of rows, from 0; the page is not changed")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="arguments of pytest")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = ["| torch | transformers | peft | supported | contract |", "| --- | --- | --- | --- | --- |"]
    failed = False
    for index, row in enumerate(rows()):
        if args.only is not None and index not in args.only:
            continue
        result = run_row(args.folder.absolute(), row, args.tests)
        failed |= row.is_supported and ("FAIL" in result or "passed" not in result)
        supported = "yes" if row.is_supported else "no, tried"
        lines.append(f"| {row.torch} | {row.transformers} | {row.peft} | {supported} | {result} |")
        print(lines[-1], flush=True)
    if args.only is None:
        write_page(PAGE, PAGE.read_text().partition(VERSIONS)[0], "\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
