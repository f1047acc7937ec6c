"""Write docs/compatibility.md from the contract checks: `make compatibility`."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from checks import CHECKS, attach, lean_levels
from families import REFUSED, SUPPORTED

from peft_bsr import UnsupportedModelError, probe_model

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
VERSIONS = """## Versions

The contract (a vision transformer in all modes, and PEFT's behaviours for BSR, ALaST and SynQT) on the oldest and
newest versions, each in an environment of its own (`python tests/contract/versions.py`); CPU, fp32.

Private interfaces of all three are used, so all have an upper bound. `pytest tests/compat` names those that a release
changed. What was released since was tried with the rest as in the first row:

- torch 2.14.1: supported. `tests/compat`, `tests/test_registration.py` and a part of the contract pass (BSR, a vision
  transformer in compact mode: 38 tests). torch 2.15.0 was not tried.
- transformers 5.24.0: not supported. `tests/compat` and the contract pass but for transformers' own calls on adapters
  (`model.add_adapter`, `enable_adapters`, `disable_adapters`, ...): they ask for peft 0.22, which is not released.
- peft: 0.21.2 is the newest.

"""
HEADER = """# Compatibility

Made by `make compatibility` from the checks of `tests/contract`, on tiny random models (32 channels, 4 blocks) on the
CPU in fp32 with scaled-dot-product attention. What each check says:

- **identity**: `keep_rate=1.0` and blocks that happen to keep all tokens equal the untouched model bit for bit;
- **masking**: dropping tokens equals keeping them and masking their keys in the blocks behind, to 1e-5;
- **scores**: the scores equal those made of the stock model's eager attention, to 1e-5;
- **gradients**: both kinds of gradient checkpointing, two forwards before the backward, equal no checkpointing;
- **lean**: gradients of lean blocks, `exact` and `max`, equal those of stock blocks to 1e-5;
- **save and load**, **disable**: bit-equal outputs after reloading under another name, disabling and unloading.

"Special" counts the tokens at the front and at the end that are never dropped. "Positions" says whether a block uses
the position of a token, by tables, biases or masks that follow the kept tokens. "Modes" names first the one that is
chosen. "Lean" names the levels in which both halves of a block run lean; where one half stays stock, because it
computes something else than norm, projections and attention, or norm and MLP, the other is named.
Models that are not in the table are probed alike: what passes is accepted, the rest is refused with the reason found.
timm's models through `TimmWrapper` are supported by the same probe; their tests run where timm is installed.
"""
COLUMNS = ("family", "class", "special", "positions", "scores from", "score", "modes", "lean", "passed")


@dataclass
class Row:
    """One family's line."""

    family: str
    model: str
    cells: list[str] = field(default_factory=list)
    refused: str | None = None


def survey(run_checks: bool = True) -> list[Row]:
    """Probe, attach and check every family."""
    rows = []
    for family, make in {**SUPPORTED, **REFUSED}.items():
        model = make()
        row = Row(family, type(model).__name__)
        rows.append(row)
        try:
            spec = probe_model(model)
        except UnsupportedModelError as error:
            row.refused = str(error).partition(" is not supported: ")[2].partition(". Use PEFT's LoRA")[0]
            continue
        config = attach(family, None).peft_config["default"]
        modes = [config.mode, *([other] if (other := _other_mode(family, config.mode)) else [])]
        special = f"{spec.num_prefix} + {spec.num_suffix}"
        positions = "side inputs follow" if spec.uses_positions else "none inside"
        row.cells = [special, positions, str(spec.scores_from), config.score, ", ".join(modes)]
        if run_checks:
            row.cells += [lean_levels(family), ", ".join(_passed(family, config.mode, modes))]
    return rows


def _other_mode(family: str, mode: str) -> str | None:
    other = "compact" if mode == "full_view" else "full_view"
    try:
        attach(family, other)
    except UnsupportedModelError:
        return None
    return other


def _passed(family: str, chosen: str, modes: list[str]) -> list[str]:
    """Names of the checks that pass in all modes; a failing one is named with its mode."""
    results = []
    for name, check in CHECKS.items():
        failed = []
        for mode in modes:
            try:
                check(family, None if mode == chosen else mode)
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{mode}: {type(error).__name__}")
        results.append(f"**{name} FAILS ({'; '.join(failed)})**" if failed else name)
    return ["all seven"] if results == list(CHECKS) else results


def render(rows: list[Row]) -> str:
    """The page."""
    supported = [row for row in rows if row.refused is None]
    lines = [HEADER, f"## {len(supported)} configurations that work", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line([row.family, f"`{row.model}`", *row.cells]) for row in supported]
    lines += ["", "## Refused, with the reason that the probe finds", "", _line(("family", "class", "reason"))]
    lines.append(_line(["---"] * 3))
    lines += [_line([row.family, f"`{row.model}`", row.refused or ""]) for row in rows if row.refused is not None]
    lines += ["", f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}."]
    return "\n".join(lines) + "\n"


def write_page(path: Path, page: str, versions: str) -> None:
    """Write the page with the table of versions, if there is one, at its end."""
    path.write_text(page.rstrip() + "\n" + (f"\n{VERSIONS}{versions}" if versions else ""))


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Write the page; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="where to write (default docs/compatibility.md)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    page = render(survey())
    earlier = args.output.read_text().partition(VERSIONS)[2] if args.output.exists() else ""
    write_page(args.output, page, earlier)
    print(f"wrote {args.output}")
    return 1 if "FAILS" in page else 0


if __name__ == "__main__":
    sys.exit(main())
