"""Predictions of adapters, transformers models and ONNX files."""

from peft_bsr.prediction.answers import Prediction, to_prediction
from peft_bsr.prediction.entry import predict
from peft_bsr.prediction.predictor import Predictor, at_size, find_device, open_predictor, to_predictor

__all__ = [
    "Prediction",
    "Predictor",
    "at_size",
    "find_device",
    "open_predictor",
    "predict",
    "to_prediction",
    "to_predictor",
]
