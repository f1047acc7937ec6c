"""The model card. It contains only what is known or was measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path

import peft
import torch
import transformers
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from peft_bsr.cost import Cost
from peft_bsr.engine import Plan
from peft_bsr.hub.facts import CardFacts
from peft_bsr.hub.task import Task, task_of
from peft_bsr.registration import package_version
from peft_bsr.tuners import MethodInfo, describe_plan, known_method
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.description import describe_picture

BEGIN, END = "<!-- peft_bsr: written by save_pretrained; edit outside of it -->", "<!-- peft_bsr: end -->"
PICTURE = "kept_tokens.png"
_TEMPLATE = "[More Information Needed]"  # text of PEFT's own, empty card


def write_card(config: SavedConfig, folder: Path) -> None:
    """Write `README.md` next to an adapter. Text around the generated part is kept.

    It runs whenever one of our adapters is saved.

    Args:
        config: Configuration of an attached adapter.
        folder: Folder of the saved adapter.
    """
    facts: CardFacts = config.facts or CardFacts()
    if facts.picture is not None and Path(facts.picture).resolve() != (folder / PICTURE).resolve():
        shutil.copyfile(facts.picture, folder / PICTURE)
    path = folder / "README.md"
    old = ModelCard.load(path, ignore_metadata_errors=True) if path.exists() else ModelCard("---\n{}\n---\n")
    base = _hub_id(config.base_model_name_or_path)
    data = _metadata(old.data, config, facts, base)
    text = _merged(old.text, model_card(config, facts, base))
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n", encoding="utf-8")


def model_card(config: SavedConfig, facts: CardFacts, base: str | None = None) -> str:
    """The card's text.

    Args:
        config: Configuration of an attached adapter.
        facts: Facts about the run.
        base: Hub id of the base model, or None if it has none.
    """
    assert config.attachment is not None, "the configuration of an attached adapter"
    method = known_method(config)
    spec, plan = config.attachment.spec, config.attachment.plan
    if facts.image_size is not None:
        spec = spec.at_size(*facts.image_size)
    task = task_of(config)
    folder = config.base_model_name_or_path and f"`{_folder(config.base_model_name_or_path)}`"
    called = f"[{base}](https://huggingface.co/{base})" if base else folder or f"a {config.attachment.classes[0]}"
    parts = [
        f"# {method.title} adapter of {called}",
        f"{task.description} Made with peft_bsr, method {method.name} ({_linked(method.paper)}).",
        "## Use\n\n" + _snippet(task, facts.repo_id),
        "## What it does\n\n" + "\n".join(f"- {sentence}" for sentence in describe_plan(config, spec, plan)),
    ]
    if facts.metrics or facts.dataset:
        on = f" on {_hub_id(facts.dataset) or _folder(facts.dataset)}" if facts.dataset else ""
        scores = [f"- {name.replace('_', ' ')}{on}: {value:.4g}" for name, value in facts.metrics.items()]
        parts.append("## Results\n\n" + ("\n".join(scores) or f"Trained{on}; not evaluated."))
        parts += [f"### {title}\n\n{_table(head, rows)}" for title, head, rows, *_ in facts.tables]
    if facts.costs:
        parts.append("## Measured\n\n" + _cost_table(facts))
    if facts.picture is not None:
        parts.append(f"## Kept tokens\n\n![{describe_picture(plan)}]({PICTURE})")
    parts.append("## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(config, method, plan)))
    parts.append(
        "## Versions\n\n"
        f"peft_bsr {package_version()}, peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}."
    )
    return "\n\n".join(parts)


def _linked(paper: str) -> str:
    """A paper on arXiv as a link; other text unchanged."""
    server, _, number = paper.partition(" ")
    return f"[{paper}](https://arxiv.org/abs/{number})" if server == "arXiv" else paper


def _snippet(task: Task, repo_id: str | None) -> str:
    place = f'"{repo_id}"' if repo_id else '"."  # this folder'
    lines = [
        f"adapter = {place}",
        "model = peft_bsr.load(adapter)  # base model, adapter, head and label names",
    ]
    if task.pipeline is not None:
        lines += ["predict = peft_bsr.pipeline(adapter)  # the same in a transformers pipeline"]
        lines += [f'predict("{task.example}")' + ("  # `score` is the value" if task.is_regression else "")]
    return "\n".join(["```python", "import peft_bsr", "", *lines, "```"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; class names are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(escape(cell, quote=False).replace('|', '&#124;') for cell in row)} |" for row in lines
    )


def _cost_table(facts: CardFacts) -> str:
    costs: list[tuple[str, Cost]] = list(facts.costs.items())
    reference = costs[0][1].step_seconds
    rows = ["| | saved activations, MiB per image | GFLOPs per step and image | step, ratio |", "|---|---|---|---|"]
    rows += [
        f"| {name} | {cost.saved_bytes_per_image / 2**20:.3g} | {cost.training_flops_per_image / 1e9:.3g} "
        f"| {cost.step_seconds / reference:.2f} |"
        for name, cost in costs
    ]
    return "\n".join(rows) + (f"\n\n{facts.conditions}" if facts.conditions else "")


def _limits(config: SavedConfig, method: MethodInfo, plan: Plan) -> list[str]:
    limits = ["Run `import peft_bsr` before loading: without it, PEFT does not know the method."]
    if not method.tuner.merges or getattr(config, "tasks", None):  # heads of tasks have no place in the base model
        limits.append("It cannot be merged into the base model.")
    elif method.tuner.reduces_in_evaluation and plan.reduces:
        limits.append("Token reduction is not part of the weights: a merged model runs on all tokens and differs.")
    if not config.base_model_name_or_path:
        limits.append(
            "The base model has no name: it was made in memory. Save it with `save_pretrained(folder)` and pass its "
            "location: `peft_bsr.load(adapter, base=folder)`."
        )
    elif _hub_id(config.base_model_name_or_path) is None:
        name = _folder(config.base_model_name_or_path)
        limits.append(
            f"The base model was read from a folder, `{name}`. On another machine pass its location: "
            "`peft_bsr.load(adapter, base=...)`."
        )
    return limits


def _metadata(old: CardData, config: SavedConfig, facts: CardFacts, base: str | None) -> ModelCardData:
    """Existing metadata updated with ours; a local path is not a valid base model on the Hub and is left out."""
    method = known_method(config).name
    kept = {k: v for k, v in old.to_dict().items() if k not in ("model-index", "base_model", "eval_results")}
    tags = {tag for tag in kept.pop("tags", None) or [] if not tag.startswith("base_model:")}
    tags |= {"peft_bsr", method} | ({f"base_model:adapter:{base}"} if base else set())
    kept |= {"library_name": "peft", "tags": sorted(tags)}
    if base:
        kept["base_model"] = base
    task = task_of(config)
    kept.pop("pipeline_tag", None)
    if task.tag is not None:
        kept["pipeline_tag"] = task.tag
    if dataset := _hub_id(facts.dataset):
        kept["datasets"] = [dataset]
    if facts.metrics and facts.dataset and task.tag is not None:
        called = dataset or _folder(facts.dataset)
        kept["model_name"] = f"{method} adapter"
        kept["eval_results"] = [
            EvalResult(task.tag, called, called, metric, value, dataset_split=split or None)
            for (split, _, metric), value in ((name.rpartition(" "), value) for name, value in facts.metrics.items())
        ]
    return ModelCardData(**kept)


def _merged(old: str, ours: str) -> str:
    """The old text with the generated part replaced, or appended."""
    part = f"{BEGIN}\n\n{ours}\n\n{END}"
    before, begin, rest = old.partition(BEGIN)
    if begin:
        return before + part + rest.partition(END)[2]
    return part if _TEMPLATE in old or not old.strip() else f"{old.strip()}\n\n{part}"


def _hub_id(name: str | None) -> str | None:
    """The name, if it looks like a Hub id and is not a local folder."""
    if not name or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        return None
    return name if "/" in name else None


def _folder(name: str | Path | None) -> str:
    """The name of a folder without its path."""
    return Path(str(name)).name


__all__ = ["model_card", "write_card"]
