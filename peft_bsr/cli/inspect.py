"""Say what a model is made of, and which methods it takes. Only its configuration is read: weights are random."""

from __future__ import annotations

import argparse
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_bsr.backbones import ModelSpec, native_size, probe_model
from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import find_adapter, make_model, model_of, read_model_config
from peft_bsr.errors import PeftBsrError, UnsupportedModelError, one_line
from peft_bsr.tuners import METHODS, describe_plan, known_method
from peft_bsr.tuners.base.base_model import with_settings

EXAMPLES = """\
examples:
  peft-bsr inspect google/vit-base-patch16-224
  peft-bsr inspect HuggingFaceTB/SmolVLM-256M-Instruct --part model.vision_model
  peft-bsr inspect outputs/train/adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder, of a model or of an adapter")
    parser.add_argument("--part", help="name of the vision model inside a larger model (default: found by itself)")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    adapter = find_adapter(args.model)
    source = model_of(adapter, args.model)
    labels = getattr(adapter, "labels", None)
    with out.doing(f"probing {source}"):
        changes = getattr(adapter, "base_config", None) or {}
        size = native_size(with_settings(read_model_config(source), changes))
        number = len(labels) if labels else None
        model = make_model(source, number, image_size=size, is_short=True).eval()
        part = args.part or getattr(adapter, "part", None)
        spec = probe_model(model, needs_tokens=False, part=part)
        parameters = sum(p.numel() for p in make_model(source, number, device="meta").parameters())
        facts = _describe(model, spec, parameters)
        result: dict[str, Any] = {"model": source, **facts}
        if adapter is None:
            result["methods"] = {name: _refusal(model, info.config(part=part)) for name, info in METHODS.items()}
        else:
            attached = PeftModel(model, adapter)
            config = attached.peft_config["default"]
            result["adapter"] = {
                "method": known_method(adapter).name,
                "labels": labels,
                "plan": describe_plan(config, spec, attached.base_model.plan()),
            }
    out.facts(source, facts)
    if adapter is None:
        rows = [(name, "no: " + why if why else "yes") for name, why in result["methods"].items()]
        out.table("Methods", ("method", "taken"), rows, left=(0, 1))
    else:
        out.facts(f"Adapter {args.model}", {result["adapter"]["method"]: "\n".join(result["adapter"]["plan"])})
    return result


def _describe(model: PreTrainedModel, spec: ModelSpec, parameters: int) -> dict[str, object]:
    reads = [f"special token {i}" for i in spec.reads_prefix]
    reads += ["patches"] * spec.reads_patches + ["detection tokens"] * spec.reads_suffix
    inside = {} if spec.part is None else {"part": f"{spec.part}, a {type(model.get_submodule(spec.part)).__name__}"}
    if spec.no_reduction is not None:
        return {
            "class": type(model).__name__,
            **inside,
            "family": model.config.model_type,
            "parameters": f"{parameters / 1e6:.2f} M",
            "blocks": spec.depth,
            "stages": ", ".join(str(len(spec.stage(i + 1))) for i in range(spec.stage_blocks[-1].stage)),
            "width": spec.width,
            "input": " x ".join(str(side) for side in spec.image_shape),
            "token reduction": f"none: {spec.no_reduction}",
        }
    scores = {None: "none"} | dict.fromkeys(("interface", "sdpa"), "queries and keys of the attention")
    return {
        "class": type(model).__name__,
        **inside,
        "family": model.config.model_type,
        "parameters": f"{parameters / 1e6:.2f} M",
        "blocks": spec.depth,
        "width": spec.width,
        "heads": spec.num_heads,
        "input": " x ".join(str(side) for side in spec.image_shape),
        "grid": None if spec.grid is None else " x ".join(str(side) for side in spec.grid),
        "tokens": f"{spec.num_tokens}: {spec.num_special} special, {spec.num_patches} patches",
        "head reads": ", ".join(reads),
        "positions in blocks": "yes, reduced to the kept tokens" if spec.uses_positions else "no",
        "scores from": scores.get(spec.scores_from, "the weights that the attention returns"),
        "block's parts": "known: lean blocks" if spec.block_spec else "not known: stock blocks",
    }


def _refusal(model: PreTrainedModel, config: PeftConfig) -> str | None:
    """The reason why a method does not support the model, or None."""
    try:
        get_peft_model(model, config).unload()
    except UnsupportedModelError as error:
        return one_line(error)
    except PeftBsrError as error:
        return f"not with its defaults: {one_line(error)}"
    return None
