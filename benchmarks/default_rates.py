"""Default learning rates against the best of a sweep in half decades around them, on digits and on CIFAR-10.

    python benchmarks/default_rates.py --model MODEL --data DATA
    python benchmarks/default_rates.py --model MODEL --data DATA --tasks digits --methods bsr --threads 1

Each run is one of `benchmarks/method_comparison` (protocol cpu: 1000 training images, 3 epochs, batch 32). Its result
is stored in `--results`, so an interrupted command continues. The best rate is chosen and compared on the same test
images, so its lead over the default may be slightly too large. The exit code is 1 if a default is more than 2 points
below the best.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent / "method_comparison"))
from launch import add_launching, add_results, launch, results_of
from train import add_sources, environment

from peft_bsr.training import LEARNING_RATES
from peft_bsr.training.learning_rate import FACTORS

EXPERIMENTS = {  # of method_comparison, with the options of the methods as they are
    "bsr": ("bsr/spread-exact", ("bsr", "full")),
    "bsr lora": ("bsr/spread-lora", ("bsr", "lora")),
    "alast": ("alast/default", ("alast", "full")),
}
ALLOWED = 0.02


def main() -> int:
    """Run what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "cifar10"], help="default: digits cifar10")
    parser.add_argument("--methods", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each rate (default 1)")
    add_sources(parser)
    add_launching(parser)
    add_results(parser)
    parser.set_defaults(results=Path(__file__).parent / "results" / "default_rates")
    args = parser.parse_args()
    runs = [
        (task, method, LEARNING_RATES[EXPERIMENTS[method][1]] * factor, seed)
        for task in args.tasks
        for method in args.methods
        for factor in FACTORS
        for seed in range(args.seeds)
    ]
    with tqdm(total=len(runs), unit="run") as bar, ThreadPoolExecutor(args.at_once) as pool:

        def one(run: tuple[str, str, float, int]) -> float:
            score = accuracy(args, *run)
            bar.update()
            return score

        scores = dict(zip(runs, pool.map(one, runs), strict=True))
    return report(args, scores)


def accuracy(args: argparse.Namespace, task: str, method: str, rate: float, seed: int) -> float:
    """Test accuracy of a run, read from its file or run now."""
    path = results_of(args) / task / method.replace(" ", "-") / f"{rate:.1e}-seed-{seed}.json"
    result = launch(args, path, EXPERIMENTS[method][0], task=task, learning_rate=rate, seed=seed)
    if result is None:
        raise SystemExit(f"{task}, {method}, {rate:.1e} failed; see {path.with_suffix('.failed.txt')}")
    return float(result["train_info"]["metrics"][0]["accuracy"])


def report(args: argparse.Namespace, scores: dict[tuple[str, str, float, int], float]) -> int:
    """Print the table. Returns 1 if a default is too far below the best rate."""
    print("| images | method | default rate | accuracy, % | best rate | accuracy, % | behind, points | all |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for task in args.tasks:
        for method in args.methods:
            default = LEARNING_RATES[EXPERIMENTS[method][1]]
            means: dict[float, float] = {}
            for rate in sorted({r for t, m, r, _ in scores if (t, m) == (task, method)}):
                means[rate] = statistics.mean(scores[task, method, rate, seed] for seed in range(args.seeds))
            best = max(means, key=lambda rate: means[rate])
            behind = means[best] - means[default]
            worst = max(worst, behind)
            tried = ", ".join(f"{rate:.1e}: {100 * score:.1f}" for rate, score in means.items())
            print(
                f"| {task} | {method} | {default:.0e} | {100 * means[default]:.1f} | {best:.1e} | "
                f"{100 * means[best]:.1f} | {100 * behind:.1f} | {tried} |"
            )
    print(f"\n{args.seeds} seed(s); {conditions()}")
    return int(worst > ALLOWED)


def conditions() -> str:
    """Machine and versions."""
    found: dict[str, Any] = environment()
    machine = found["system_info"]
    versions = ", ".join(f"{name.removesuffix('-version')} {v}" for name, v in found["package_info"].items())
    return f"{machine['processor']} ({machine['device']}), torch {found['pytorch_info']}, {versions}."


if __name__ == "__main__":
    raise SystemExit(main())
