"""From an adapter to an ONNX file with its token reduction, and predictions with onnxruntime alone.

    python examples/quickstart.py && python examples/export_onnx.py --adapter outputs/quickstart/adapter
    python examples/export_onnx.py --quantize int8

Without `--adapter` an untrained one is exported: only its speed is meaningful.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnxruntime
import transformers
from peft import PeftModel, get_peft_model

from peft_bsr import BSRConfig, export
from peft_bsr.data import load_images, load_processor, put_aside, to_pixels

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, load_base, make_parser, size_of


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--adapter", help="Hub id or folder of an adapter (default: an untrained one)")
    parser.add_argument("--keep-rate", type=float, default=0.5, help="keep rate of the untrained adapter (default 0.5)")
    parser.add_argument("--quantize", choices=["int8"], help="default: fp32")
    parser.add_argument("--output", type=Path, default=Path("outputs/export"), help="default outputs/export")
    return parser.parse_args()


def main() -> None:
    """Export, check, time; then classify without PyTorch."""
    args = parse_arguments()
    transformers.set_seed(0)
    data = put_aside(load_images(args.dataset), validation_size=0)
    source, _ = find_model(args.model)
    processor = load_processor(source, size_of(args))
    base = load_base(source, data.labels)
    if args.adapter:
        model = PeftModel.from_pretrained(base, args.adapter)
    else:
        model = get_peft_model(base, BSRConfig(keep_rate=args.keep_rate))

    args.output.mkdir(parents=True, exist_ok=True)
    report = export(
        model,
        "onnx",
        args.output / "model.onnx",
        image_size=processor.size["height"],
        quantize=args.quantize,
        image_processor=processor,
    )
    print(report.describe())

    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    some = data.test.select(range(min(100, len(data.test))))
    pixels = to_pixels(some["image"], processor).numpy()
    (logits,) = session.run(["logits"], {report.input_name: pixels})
    accuracy = (logits.argmax(-1) == some["label"]).mean()
    print(f"accuracy of the file on {len(some)} test images: {accuracy:.2f}")


if __name__ == "__main__":
    main()
