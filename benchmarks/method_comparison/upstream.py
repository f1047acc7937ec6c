"""Write experiments and results as a suite of PEFT's own method comparison, see docs/upstream.md.

    python benchmarks/method_comparison/upstream.py --task cifar10 --protocol gpu --output image-classification

Each seed becomes an experiment, as there: `experiments/METHOD/NAME-random_seed_N/` with `adapter_config.json` and
`training_params.json` (what differs from `default_training_params.json`), and
`results/METHOD--NAME-random_seed_N.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from experiment import EXPERIMENTS, Experiment
from launch import HERE, add_results, results_of
from run import result_path


def main() -> None:
    """Write the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cifar10", help="default cifar10")
    parser.add_argument("--protocol", default="gpu", help="default gpu")
    parser.add_argument("--output", type=Path, required=True, help="folder of the suite; must not exist")
    add_results(parser)
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists. Choose a new folder with --output.")
    found = {
        experiment.name: paths
        for experiment in Experiment.chosen(None)
        if (paths := sorted(result_path(results_of(args), args.task, experiment.name, 0).parent.glob("seed-*.json")))
    }
    if not found:
        raise SystemExit(
            f"{results_of(args)} has no results on {args.task}. Run run.py --protocol {args.protocol} first."
        )
    args.output.mkdir(parents=True)
    shutil.copy(HERE / "default_training_params.json", args.output)
    for name, paths in found.items():
        for path in paths:
            write(args.output, name, json.loads(path.read_text()))
    print(f"{args.output}: {sum(map(len, found.values()))} results of {len(found)} experiments")


def write(output: Path, name: str, result: dict[str, Any]) -> None:
    """The experiment and the result of one run."""
    used = result["run_info"]["train_config"]
    own = f"{name}-random_seed_{used['seed']}"
    folder = output / "experiments" / own
    folder.mkdir(parents=True)
    adapter = EXPERIMENTS / name / "adapter_config.json"
    if adapter.exists():
        shutil.copy(adapter, folder)
    params = json.loads((EXPERIMENTS / name / "training_params.json").read_text())
    params |= {"learning_rate": used["learning_rate"], "seed": used["seed"]}
    (folder / "training_params.json").write_text(json.dumps(params, indent=2) + "\n")
    (output / "results").mkdir(exist_ok=True)
    (output / "results" / f"{own.replace('/', '--')}.json").write_text(
        json.dumps(as_theirs(result, own), indent=2) + "\n"
    )


def as_theirs(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The result under the names that PEFT's comparison reads.

    Accelerator memory is left out where there was no accelerator.
    """
    run, train = dict(result["run_info"]), dict(result["train_info"])
    version = result["meta_info"]["package_info"]["peft-version"]
    run |= {"experiment_name": name, "peft_branch": version, "peft_bsr_commit": run.pop("commit")}
    start, peak = train.pop("memory_start_bytes"), train.pop("memory_peak_bytes")
    if result["meta_info"]["system_info"]["device"] != "cpu":
        train |= {"accelerator_memory_max": peak, "accelerator_memory_start": start}
    return {"run_info": run, "train_info": train, "meta_info": result["meta_info"]}


if __name__ == "__main__":
    main()
