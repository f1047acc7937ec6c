"""Train and score every experiment of the comparison. Existing results are kept, so it can be stopped and continued.

    python benchmarks/method_comparison/run.py --model MODEL --data DATA
    python benchmarks/method_comparison/run.py --only bsr/spread-exact full_finetuning/all --tasks cifar10

Learning rates are those of `results/PROTOCOL/recipes.json` (see sweep.py). Results:
`results/PROTOCOL/TASK/EXPERIMENT/seed-N.json`.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from data import Protocol
from experiment import Experiment
from launch import add_experiments, add_launching, add_results, launch, results_of
from sweep import load_recipes
from train import add_sources


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_experiments(parser)
    parser.add_argument("--tasks", nargs="*", help="see data.py (default: the protocol's)")
    parser.add_argument("--seeds", type=int, nargs="*", help="these seeds (default: as many as the protocol asks for)")
    add_sources(parser)
    add_launching(parser)
    add_results(parser)
    args = parser.parse_args()
    protocol = Protocol.load(args.protocol)
    recipes = load_recipes(args)
    experiments = Experiment.chosen(args.only or list(protocol.experiments))
    if missing := {e.params["recipe"] for e in experiments} - set(recipes):
        raise SystemExit(f"{results_of(args)} has no recipe for {sorted(missing)}; run sweep.py first.")
    runs = [
        (seed, task, experiment)
        for seed in args.seeds or range(max(protocol.main_seeds, protocol.other_seeds))
        for task in args.tasks or protocol.tasks
        for experiment in experiments
        if args.seeds or seed < (protocol.main_seeds if experiment.params["main"] else protocol.other_seeds)
    ]
    with tqdm(total=len(runs), unit="run") as bar, ThreadPoolExecutor(args.at_once) as pool:

        def one(run: tuple[int, str, Experiment]) -> bool:
            seed, task, experiment = run
            path = result_path(results_of(args), task, experiment.name, seed)
            rate = recipes[experiment.params["recipe"]]["learning_rate"]
            result = launch(args, path, experiment.name, task=task, seed=seed, learning_rate=rate)
            score = "failed" if result is None else f"{result['train_info']['metrics'][0]['accuracy']:.3f}"
            bar.write(f"{task} {experiment.name} seed {seed}: {score}")
            bar.update()
            return result is not None

        succeeded = sum(pool.map(one, runs))
    if succeeded < len(runs):
        raise SystemExit(
            f"{len(runs) - succeeded} of {len(runs)} runs failed; see the .failed.txt files in {args.results}."
        )


def result_path(results: Path, task: str, experiment: str, seed: int) -> Path:
    """Path of the result of a run."""
    return results / task.replace("/", "--") / experiment.replace("/", "--") / f"seed-{seed}.json"


if __name__ == "__main__":
    main()
