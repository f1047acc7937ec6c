"""Trains a method for a short time on your own images, to compare it with others."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace

import transformers
from transformers import BaseImageProcessor, ProgressCallback

from peft_bsr.cli.memory import Peak, predict_peak, watch_peak
from peft_bsr.cli.methods import attach
from peft_bsr.cli.output import Output
from peft_bsr.cli.resuming import RunCallback
from peft_bsr.cli.saving import may_fail, trained_model
from peft_bsr.cli.scaling import find_scale, fold
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.sources import load_model
from peft_bsr.cli.training import make_trainer, training_arguments
from peft_bsr.data import LabelledImages
from peft_bsr.prediction import to_predictor
from peft_bsr.prediction.scoring import Score, score

_QUIET = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}


class _Bar(ProgressCallback):
    """Progress bar without logs of the Trainer."""

    def on_log(self, *args: object, **kwargs: object) -> None:
        """Print nothing."""


@dataclass(frozen=True)
class Trial:
    """Result of a short run.

    Attributes:
        score: Score on the validation images.
        steps: Number of optimizer steps.
        epochs: Number of epochs.
        seconds: Training time.
        learning_rate: Maximum learning rate.
        peak: Peak memory.
    """

    score: Score
    steps: int
    epochs: float
    seconds: float
    learning_rate: float
    peak: Peak

    def to_dict(self) -> dict[str, object]:
        """The result for JSON."""
        values = {name: getattr(self, name) for name in ("steps", "epochs", "seconds", "learning_rate")}
        return {**self.score.figures(), **values, "peak_memory": self.peak.to_dict()}


def bounded(settings: TrainSettings, images: int, seconds: float, seconds_a_step: float) -> TrainSettings:
    """Limit the steps of a run to a training time. The learning rate schedule covers the limited run.

    Args:
        settings: Settings with `epochs` and `batch_size`.
        images: Number of training images.
        seconds: Maximum training time.
        seconds_a_step: Measured time of a step.
    """
    wanted = math.ceil(settings.epochs * math.ceil(images / settings.batch_size))
    return replace(settings, max_steps=max(min(wanted, int(seconds / seconds_a_step)), 1))


def run_trial(settings: TrainSettings, data: LabelledImages, processor: BaseImageProcessor, out: Output) -> Trial:
    """Train and score a method without saving anything.

    Args:
        settings: Settings of the run; nothing is written to `output`.
        data: Images with the splits `train` and `validation`.
        processor: Image processor.
        out: Output of the command.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed.
        PeftBsrError: If the method does not support the model, or if its loss is not finite.
    """
    assert data.validation is not None
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, output=folder, trainer=_QUIET)
        arguments = training_arguments(settings, out)
        transformers.set_seed(settings.seed)
        clock = RunCallback(settings)
        with watch_peak(arguments.device) as peak:
            base = load_model(settings.model, data.labels, data.problem_type, settings.image_size)
            with may_fail("prediction of peak memory", out, "The run continues."):
                peak.predicted = predict_peak(settings, arguments, base, processor)
            model = attach(settings.method, base, settings.options)
            scale = find_scale(model, data, processor, out)
            trainer = make_trainer(model, settings, arguments, data, processor, clock, scale)
            if not out.is_json:
                trainer.remove_callback(ProgressCallback)
                trainer.add_callback(_Bar())
            try:
                trainer.train()
            finally:
                clock.release()
    if clock.is_interrupted:
        raise KeyboardInterrupt
    trained = trained_model(trainer)
    fold(scale, trained, data, processor)
    predictor = to_predictor(trained, processor)
    found = score(predictor, data.validation, batch_size=arguments.per_device_eval_batch_size, progress=False)
    state = trainer.state
    return Trial(found, state.global_step, float(state.epoch), clock.seconds_before, settings.rate, peak)


__all__ = ["Trial", "bounded", "run_trial"]
