"""Find a learning rate for each recipe, by the same rule and on the same images for every method.

    python benchmarks/method_comparison/sweep.py --model MODEL --data DATA

Each recipe is tried on its leading experiment (`"leads": true`), at 1e-4, 3e-4 and 1e-3, then outwards in equal steps
until there is a worse rate on either side of the best one. Rates are ranked by accuracy on the validation split (then
by loss), after the protocol's epochs on fewer images of its first task. Test images are not used. The results are in
`results/PROTOCOL/recipes.json`; runs with a result are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from data import Protocol
from experiment import Experiment
from launch import add_launching, add_results, launch, results_of, stored
from train import add_sources

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
START = (2, 3, 4)


def main() -> None:
    """Sweep and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these recipes (default: all)")
    add_sources(parser)
    add_launching(parser)
    add_results(parser)
    args = parser.parse_args()
    leaders = {e.params["recipe"]: e.name for e in Experiment.all() if e.params["leads"]}
    chosen = {recipe: leaders[recipe] for recipe in args.only or leaders}
    with tqdm(total=len(chosen), unit="recipe") as bar, ThreadPoolExecutor(args.at_once) as pool:

        def search(recipe: str) -> tuple[str, dict[str, Any]]:
            found = find_rate(args, recipe, chosen[recipe])
            bar.update()
            bar.write(f"{recipe}: {found['learning_rate']:g} of {found['tried']}")
            return recipe, found

        found = dict(pool.map(search, chosen))
    path = results_of(args) / "recipes.json"
    path.write_text(json.dumps(stored(path) | found, indent=2) + "\n")


def load_recipes(args: argparse.Namespace) -> dict[str, Any]:
    """Results of earlier sweeps, by recipe: for `--seconds`, else the protocol's, else those of its `rates_of`."""
    protocol = Protocol.load(args.protocol)
    folders = [args.results / name for name in (protocol.rates_of, protocol.name) if name]
    return {k: v for folder in (*folders, results_of(args)) for k, v in stored(folder / "recipes.json").items()}


def find_rate(args: argparse.Namespace, recipe: str, experiment: str) -> dict[str, Any]:
    """The best rate of a recipe, and the validation accuracy of every rate."""
    task = Protocol.load(args.protocol).tasks[0]
    scores: dict[int, tuple[float, float]] = {}

    def try_rate(index: int) -> None:
        path = results_of(args) / "sweep" / recipe / f"{RATES[index]:g}.json"
        result = launch(args, path, experiment, task=task, learning_rate=RATES[index], sweep=True)
        if result is None:
            raise SystemExit(f"{recipe} failed; see {path.with_suffix('.failed.txt')}")
        (metrics,) = result["train_info"]["metrics"]
        loss = metrics["loss"]
        scores[index] = (metrics["accuracy"], -loss if loss == loss else float("-inf"))

    for index in START:
        try_rate(index)
    while True:
        best = max(scores, key=lambda index: scores[index])
        outside = [i for i in (best - 1, best + 1) if 0 <= i < len(RATES) and i not in scores]
        if not outside:
            tried = {f"{RATES[i]:g}": scores[i][0] for i in sorted(scores)}
            return {"learning_rate": RATES[best], "experiment": experiment, "tried": tried}
        for index in outside:
            try_rate(index)


if __name__ == "__main__":
    main()
