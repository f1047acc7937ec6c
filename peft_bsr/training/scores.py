"""What Trainer is told of predictions."""

from __future__ import annotations

from typing import Any


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers, for Trainer's `compute_metrics`."""
    predictions = prediction.predictions
    logits = predictions[0] if isinstance(predictions, tuple) else predictions  # some models give more than logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


__all__ = ["compute_accuracy"]
