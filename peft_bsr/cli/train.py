"""Fine-tune with Trainer, keep the adapter with its model card and image processor, write a report."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import transformers
from peft import PeftModel
from torch import Tensor
from torch.utils.data import default_collate
from transformers import BaseImageProcessor, PreTrainedModel, Trainer

from peft_bsr.cli.images import read_processor, read_training_data
from peft_bsr.cli.measurements import (
    RunMeasurements,
    draw_confusion_matrix,
    draw_pictures,
    headline_of,
    make_record,
    measure_costs,
    show_worst,
)
from peft_bsr.cli.memory import predict_peak, watch_peak
from peft_bsr.cli.methods import BASELINES, attach, check_method
from peft_bsr.cli.output import Output
from peft_bsr.cli.resuming import (
    RunCallback,
    check_data,
    check_output,
    digest_data,
    find_checkpoint,
    take_stored_settings,
)
from peft_bsr.cli.saving import (
    budgets_of,
    kept_in_words,
    kept_step,
    last_of,
    may_fail,
    save_model,
    score_all,
    trained_model,
    write_adapter_card,
    write_scores,
    write_summary,
)
from peft_bsr.cli.scaling import find_scale, fold
from peft_bsr.cli.settings import TrainSettings, add_settings, read_settings
from peft_bsr.cli.sources import describe_head, find_adapter, load_model, make_model, refuse_sound
from peft_bsr.cli.training import fit_to_data, make_trainer, optimizer_maker, training_arguments
from peft_bsr.data import size_of
from peft_bsr.errors import UsageError
from peft_bsr.report import write_report
from peft_bsr.training import FeatureCache, find_learning_rate
from peft_bsr.tuners import METHODS, describe_plan

Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]
EXAMPLES = """\
examples:
  peft-bsr train --model google/vit-base-patch16-224-in21k --dataset beans --set preset=balanced
  peft-bsr train --model google/vit-base-patch16-224-in21k --dataset beans --augment strong --ema --output outputs/ema
  peft-bsr train --model facebook/dinov2-small --method alast --set trainable_blocks_per_step=6 --output outputs/alast
  peft-bsr train --model facebook/dinov2-small --dataset beans --method linear --output outputs/linear
  peft-bsr train --model facebook/dinov2-small --dataset faces.csv --label-column age --task regression --output out/age
  peft-bsr train --model facebook/dinov2-small --dataset photos.csv --label-column cat,dog,fox --output outputs/animals
  peft-bsr train --config run.yaml --set trainable_blocks=last:3 --output outputs/last3
  peft-bsr train --output outputs/train --resume

written below --output: adapter/ (weights, model card, image processor; model/ with --method full and linear),
report.html, summary.json, scores.json (classes, confusion matrix, worst images), confusion.png, settings.yaml,
data.json (digests of the data), checkpoints/ (one an epoch, the last is kept, and the best with --keep best).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    parser.add_argument(
        "--no-measuring", action="store_true", help="do not measure peak memory or compare with full fine-tuning"
    )


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    take_stored_settings(args)
    settings = read_settings(args)
    check_method(settings.method, settings.options)
    output = Path(settings.output)
    checkpoint = find_checkpoint(settings, args.resume)
    arguments = training_arguments(settings, out)
    if find_adapter(settings.model) is not None:
        raise UsageError(
            f"`{settings.model}` is an adapter. Give its base model, or pass `--resume` to continue its run."
        )
    refuse_sound(settings.model)
    if settings.image_size is not None:  # an unsupported size is an error before anything is read
        make_model(settings.model, device="meta", image_size=settings.image_size)
    check_output(output)
    data = read_training_data(settings, out)
    digest = digest_data(data)
    if checkpoint is not None:
        check_data(settings, digest)
    fit_to_data(arguments, settings, data)
    processor = read_processor(
        settings.model, out, image_size=settings.image_size, mean=settings.mean, std=settings.std
    )
    transformers.set_seed(settings.seed)
    found, report = RunMeasurements(), None
    with ExitStack() as stack:
        if not args.no_measuring:
            found.peak = stack.enter_context(watch_peak(arguments.device))
        base = load_model(settings.model, data.labels, data.problem_type, settings.image_size)
        if head := describe_head(settings.model, base):
            out.note(head)
        if not args.no_measuring:
            with may_fail("prediction of peak memory", out, "The run continues."):
                found.peak.predicted = predict_peak(settings, arguments, base, processor)
        model = attach(settings.method, base, settings.options)
        words = _in_words(model, settings, processor)
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in data.splits.items())
        out.note(f"{settings.model}: {counts} images; {_size_in_words(processor, model)}")
        out.note("\n".join(words))
        if found.peak.predicted is not None:
            out.note(f"peak memory of a step: {found.peak}; Python and torch come on top")
        clock = RunCallback(settings, digest)
        scale = find_scale(model, data, processor, out)
        trainer = make_trainer(model, settings, arguments, data, processor, clock, scale)
        stack.callback(clock.release)
        if settings.cache:
            cache = FeatureCache.build(
                model,
                trainer.train_dataset,
                output / "cache",
                collate=trainer.data_collator,
                progress=not out.is_json,
                freeze_random=True,
            )
            if cache.drawing:
                out.note(f"cache: `{cache.drawing}` is random in training, but not with a cache")
            stack.enter_context(cache.read_by(model))
            trainer.train_dataset, trainer.data_collator = cache, partial(_collate_either, trainer.data_collator)
        _set_learning_rate(trainer, settings, out)
        trainer.train(resume_from_checkpoint=checkpoint)
    if clock.is_interrupted:
        out.note(f"saved after step {trainer.state.global_step}; to continue: {_resume_command(settings)}")
        raise KeyboardInterrupt

    model = trained_model(trainer)
    fold(scale, model, data, processor)
    folder = save_model(model, processor, output)
    scores = score_all(
        model,
        data,
        processor,
        batch_size=arguments.per_device_eval_batch_size,
        workers=settings.workers,
        progress=not out.is_json,
    )
    seconds = clock.seconds_before
    write_summary(trainer, settings, scores, found, seconds=seconds, folder=folder, report=None)
    last = scores.get(last_of(scores) or "")
    with may_fail("scores.json", out):
        write_scores(scores, output / "scores.json")
    if last is not None:
        with may_fail("confusion matrix", out):
            draw_confusion_matrix(found, last, output / "confusion.png")
        with may_fail("images with the highest loss", out):
            show_worst(found, last)
    if settings.method in METHODS:
        with may_fail("pictures", out):
            draw_pictures(found, model, data, processor, output)
    if not args.no_measuring and settings.method != "full":
        with may_fail("costs", out), out.doing("measuring against full fine-tuning on the same batch"):
            measure_costs(found, model, settings, data, processor)
    with may_fail("model card", out):
        write_adapter_card(model, settings, scores, found, folder, image_size=size_of(processor))
    kept = kept_in_words(trainer)
    headline = headline_of(model, settings, found, scores, seconds=seconds, kept=kept)
    with may_fail("report", out):
        record = make_record(
            model,
            settings,
            found,
            words,
            headline=headline,
            scores=scores,
            kept_step=kept_step(trainer),
            log_history=trainer.state.log_history,
            budgets=budgets_of(trainer),
            command=shlex.join(["peft-bsr", *args.typed]),
        )
        report = write_report(record, output / "report.html")
    summary = write_summary(trainer, settings, scores, found, seconds=seconds, folder=folder, report=report)
    out.facts("Trained", headline)
    if arguments.load_best_model_at_end:
        out.say(f"kept: {kept}, the best by validation")
    out.say(f"{folder.name}: {folder}" + (f"\nreport: {report}" if report else ""))
    return summary


def _collate_either(collate_images: Collate, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate rows of a cache with torch's default, and images (of the validation split) with `collate_images`."""
    return collate_images(examples) if "pixel_values" in examples[0] else default_collate(examples)


def _set_learning_rate(trainer: Trainer, settings: TrainSettings, out: Output) -> None:
    """Set the given learning rate, the default of the method, or with `auto` the best of a sweep; print and save it."""
    if settings.learning_rate == "auto":
        make_optimizer = optimizer_maker(settings, trainer.model, trainer.args)
        out.note(f"sweeping learning rates around {settings.rate:.1e}: at most five, 20 steps each")
        found = find_learning_rate(trainer, make_optimizer=make_optimizer)
        out.note(str(found))
        trainer.args.learning_rate = found.learning_rate
        if make_optimizer is not None:
            trainer.optimizer = make_optimizer(found.learning_rate)
    else:
        out.note(
            f"learning rate {settings.rate:.1e}"
            + ("" if settings.learning_rate else f" (default of {settings.method})")
        )
    settings.learning_rate = trainer.args.learning_rate


def _in_words(model: PeftModel | PreTrainedModel, settings: TrainSettings, processor: BaseImageProcessor) -> list[str]:
    if settings.method in METHODS:
        spec = model.base_model.spec.at_size(*size_of(processor))
        return describe_plan(model.peft_config["default"], spec, model.base_model.plan())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [f"{BASELINES[settings.method]}: {trained / 1e6:.2f} M parameters train."]


def _size_in_words(processor: BaseImageProcessor, model: PeftModel | PreTrainedModel) -> str:
    """`224 x 224 px, 257 tokens`."""
    height, width = size_of(processor)
    spec = getattr(getattr(model, "base_model", None), "spec", None)
    if spec is None or spec.no_reduction is not None:
        return f"{height} x {width} px"
    return f"{height} x {width} px, {spec.at_size(height, width).num_tokens} tokens"


def _resume_command(settings: TrainSettings) -> str:
    return shlex.join(["peft-bsr", "train", "--output", settings.output, "--resume"])
