"""What is in an adapter's two files, and whether they are complete and belong together. Nothing in them is executed."""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import changed
from peft_bsr.compat.peft_api import config_class
from peft_bsr.errors import PeftBsrError, UsageError, one_line
from peft_bsr.tuners.base.files import check_adapter, check_weights, read_config

EXAMPLES = """\
examples:
  peft-bsr check-adapter outputs/train/adapter
  peft-bsr check-adapter downloaded --json
"""
_TOLD_APART = {"base_config", "base_model_name_or_path", "digests", "fingerprint", "labels", "layout", "peft_type"}
_TOLD_APART |= {"auto_mapping", "inference_mode", "peft_version", "revision"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="with adapter_config.json and adapter_model.safetensors")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command. Exit code 1 if the adapter would be refused."""
    folder = Path(args.folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no folder `{args.folder}`.")
    result: dict[str, object] = {"adapter": str(args.folder)}
    try:
        result |= _describe(folder)
        check_adapter(folder)
        result["verdict"] = "whole: its files belong together, and it can be loaded on the model it names"
    except PeftBsrError as error:
        result["verdict"] = f"refused: {one_line(error)}"
        out.exit_code = 1
    out.facts(f"Adapter {args.folder}", {name: _words(value) for name, value in result.items() if name != "adapter"})
    return result


def _describe(folder: Path) -> dict[str, object]:
    values = read_config(folder)
    config = config_class(values["peft_type"]).from_pretrained(str(folder))
    found = check_weights(folder)
    settings = {name: value for name, value in changed(config).items() if name not in _TOLD_APART and value is not None}
    return {
        "method": str(values["peft_type"]).lower(),
        "base model": config.base_model_name_or_path,
        "model": {name: value for name, value in (config.fingerprint or {}).items() if value is not None},
        "classes": None if config.labels is None else len(config.labels),
        "plan": settings,
        "trains": sorted(config.layout.values()) if getattr(config, "layout", None) else None,
        "tensors": len(found),
        "numbers": sum(tensor.numel() for tensor in found.values()),
        "MiB": round(sum(tensor.numel() * tensor.element_size() for tensor in found.values()) / 2**20, 2),
        "digests": "settings and weights" if config.digests else "none: saved by an earlier version, or changed",
    }


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "not stored"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
