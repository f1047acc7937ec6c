"""The peak memory of every experiment when a step's images come in smaller parts, whose gradients accumulate.

    python benchmarks/method_comparison/memory.py --model MODEL

The gradients of a step do not depend on the parts (no layer mixes images), so neither does the accuracy: within a
limit, each method has the accuracy of its row. report.py makes the tables and plots. The peak is that of `costs.py`,
in one process for each experiment; existing results are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import transformers
from tqdm.auto import tqdm

sys.path.extend(str(folder) for folder in Path(__file__).parents[:2])
from costs import peak_bytes, random_batch, ready
from data import Protocol
from experiment import Experiment
from launch import add_experiments, add_results, results_of, stored
from own_process import in_own_process
from train import add_sources


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_experiments(parser)
    parser.add_argument("--peaks-of", help=argparse.SUPPRESS)
    add_sources(parser)
    add_results(parser)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    whole = Protocol.load(args.protocol).batch_size
    if args.peaks_of:
        print(json.dumps(peaks(Experiment.load(args.peaks_of), args.model, whole)))
        return
    path = results_of(args) / "memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = stored(path)
    for experiment in tqdm(Experiment.chosen(args.only), unit="experiment"):
        if experiment.name not in found:
            arguments = ["--peaks-of", experiment.name, "--model", args.model, "--protocol", args.protocol]
            found[experiment.name] = in_own_process(__file__, *arguments)
            path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def peaks(experiment: Experiment, source: str, whole: int) -> dict[int, int]:
    """Images that run together -> peak in bytes, from 1 to a step's `whole` batch, in powers of two."""
    model = ready(experiment, source)
    return {
        images: peak_bytes(model, random_batch(model, images), whole // images)
        for images in (2**power for power in range(whole.bit_length()))
    }


if __name__ == "__main__":
    main()
