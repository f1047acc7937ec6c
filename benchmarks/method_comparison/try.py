"""Score variants of one recipe on the validation split, with the recipe's learning rate.

    python benchmarks/method_comparison/try.py bsr_spread bsr_tried/every2 bsr_tried/reduce_9 --model MODEL --data DATA

The images, epochs and rates are those of the sweep; results: `results/PROTOCOL/tried/EXPERIMENT.json`.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from data import Protocol
from launch import add_launching, add_results, launch, results_of
from sweep import load_recipes
from train import add_sources


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe that gives the learning rate, see sweep.py")
    parser.add_argument("experiments", nargs="+", help="folders below experiments/")
    add_sources(parser)
    add_launching(parser)
    add_results(parser)
    args = parser.parse_args()
    rate = load_recipes(args)[args.recipe]["learning_rate"]
    task = Protocol.load(args.protocol).tasks[0]
    with tqdm(total=len(args.experiments), unit="run") as bar, ThreadPoolExecutor(args.at_once) as pool:

        def one(experiment: str) -> None:
            path = results_of(args) / "tried" / f"{experiment.replace('/', '--')}.json"
            result = launch(args, path, experiment, task=task, learning_rate=rate, sweep=True)
            bar.write(f"{experiment}: {'failed' if result is None else result['train_info']['metrics'][0]['accuracy']}")
            bar.update()

        list(pool.map(one, args.experiments))


if __name__ == "__main__":
    main()
