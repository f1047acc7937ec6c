"""The method comparison: its experiments can be attached, its splits are clean, and a small one runs to a page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftConfig
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

FOLDER = Path(__file__).parents[2] / "benchmarks" / "method_comparison"
CONFIG = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def images(count: int, seed: int) -> Dataset:
    """Three classes, each bright in one colour, in no order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 3)
    pixels = rng.integers(0, 100, (count, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[..., label] += 120
    features = Features({"img": Image(), "fine_label": ClassLabel(names=["red", "green", "blue"])})
    return Dataset.from_dict({"img": list(pixels), "fine_label": labels.tolist()}, features=features)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A tiny model, images and a protocol, as files."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**CONFIG, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    images(60, seed=0).to_parquet(folder / "colours-train-60.parquet")
    images(30, seed=1).to_parquet(folder / "colours-test-30.parquet")
    protocol = {
        "tasks": ["colours"], "train_images": 30, "validation_images": 15, "test_images": 15, "epochs": 1,
        "batch_size": 15, "main_seeds": 2, "other_seeds": 1, "sweep_train_images": 15,
    }  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(protocol))
    return {"model": folder / "vit", "data": folder, "protocol": folder / "tiny.json", "results": folder / "results"}


def run(script: str, sources: dict[str, Path], *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script)]
    for name in ("protocol", "results") if script == "report.py" else ("model", "data", "protocol", "results"):
        command += [f"--{name}", str(sources[name])]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_experiment_trains_what_it_says(sources):
    from experiment import Experiment, load_base

    experiments = {e.name: e for e in Experiment.all()}
    assert len(experiments) > 30
    assert {n.split("/")[0] for n, e in experiments.items() if e.is_candidate} == {"alast_tried", "bsr_tried"}
    leaders = [(e.params["recipe"], name) for name, e in experiments.items() if e.params["leads"]]
    assert sorted(recipe for recipe, _ in leaders) == sorted({e.params["recipe"] for e in experiments.values()})
    recipes = json.loads((FOLDER / "results" / "cpu" / "recipes.json").read_text())
    assert dict(leaders) == {recipe: found["experiment"] for recipe, found in recipes.items()}
    trained = {}
    for name, experiment in experiments.items():
        torch.manual_seed(0)
        model = experiment.attach(load_base(str(sources["model"]), ["red", "green", "blue"]))
        trained[name] = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("classifier" in parameter for parameter in trained[name]), name
    plain = {n for n, _ in load_base(str(sources["model"]), ["red", "green", "blue"]).named_parameters()}
    assert trained["full_finetuning/all"] == plain
    assert trained["linear_probe/head"] == {"classifier.weight", "classifier.bias"}
    last3 = {n for n in plain if any(f"layers.{i}." in n for i in (9, 10, 11)) or "layernorm." in n}
    assert trained["last_blocks/last3"] == last3 | {"classifier.weight", "classifier.bias"}
    assert trained["bitfit/biases"] == {n for n in plain if n.endswith("bias")} | {"classifier.weight"}
    assert {n.split("layers.")[1].split(".")[0] for n in trained["bsr/spread-exact"] if "layers." in n} == {
        "3",
        "7",
        "11",
    }
    norms = {n.split(".base_layer")[0].split(".ln_tuning")[0] for n in trained["ln_tuning/all"] if "ln_tuning" in n}
    assert len(norms) == 25


def test_splits_share_no_image_and_are_even(sources):
    from data import Protocol, load_task

    protocol = Protocol.load(str(sources["protocol"]))
    parts = load_task("colours", protocol, sources["data"])
    again = load_task("colours", protocol, sources["data"])
    seen: set[bytes] = set()
    for split, size in (("train", 30), ("validation", 15), ("test", 15)):
        pictures = {np.asarray(image).tobytes() for image in parts[split]["image"]}
        assert len(pictures) == size and not pictures & seen
        assert np.bincount(parts[split]["label"]).tolist() == [size // 3] * 3
        assert parts[split]["label"] == again[split]["label"]
        seen |= pictures


def test_decoded_images_are_those_of_the_processor(sources, tmp_path, monkeypatch):
    import pixels
    from data import Protocol, load_task, with_pixels

    monkeypatch.setattr(pixels.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(pixels, "_AT_ONCE", 4)
    protocol = Protocol.load(str(sources["protocol"]))
    part = load_task("colours", protocol, sources["data"])["test"]
    path = pixels.decode(part, str(sources["model"]), protocol)
    written = path.stat().st_mtime_ns
    decoded = pixels.on_device(pixels.decode(part, str(sources["model"]), protocol))
    assert path.stat().st_mtime_ns == written and len(decoded) == len(part)
    rows = with_pixels(part, str(sources["model"]))
    batch = decoded.__getitems__([3, 0, 7])
    for place, i in enumerate([3, 0, 7]):
        assert torch.equal(batch["pixel_values"][place], torch.as_tensor(rows[i]["pixel_values"]))
        assert batch["labels"][place] == rows[i]["labels"] == decoded[i]["labels"]


def test_a_sweep_takes_the_best_rate_inside_what_it_tried(monkeypatch, sources):
    import argparse

    import sweep

    def fake(args: object, path: Path, experiment: str, **settings: float) -> dict:
        accuracy = 1 - abs(np.log10(settings["learning_rate"] / 3e-3))
        return {"train_info": {"metrics": [{"accuracy": accuracy, "loss": 1.0}]}}

    monkeypatch.setattr(sweep, "launch", fake)
    args = argparse.Namespace(protocol=str(sources["protocol"]), results=sources["results"])
    found = sweep.find_rate(args, "full", "full_finetuning/all")
    assert found["learning_rate"] == 3e-3
    assert list(found["tried"]) == ["0.0001", "0.0003", "0.001", "0.003", "0.01"]


def test_candidates_run_only_where_they_are_named():
    from experiment import Experiment

    assert not any(e.is_candidate for e in Experiment.chosen(None)) and len(Experiment.chosen(None)) > 30
    candidate = next(e.name for e in Experiment.all() if e.is_candidate)
    assert [e.name for e in Experiment.chosen([candidate])] == [candidate]


def test_costs_go_on_where_they_were_stopped(sources, tmp_path, monkeypatch):
    import costs

    for setting in ("set_verbosity_error", "disable_progress_bar"):  # would outlast the test
        monkeypatch.setattr(costs.transformers.logging, setting, lambda: None)
    measured = []
    parts = {"measure": ("step_to_full", lambda: {"step_to_full": 1.0}), "peak_in_own_process": ("peak", lambda: 1)}
    for name, (part, result) in parts.items():

        def fake(experiment: object, args: object, part=part, result=result) -> object:
            measured.append(part)
            return result()

        monkeypatch.setattr(costs, name, fake)

    def run_costs(*arguments: str) -> list[str]:
        measured.clear()
        common = ["--only", "lora/qv", "--protocol", str(sources["protocol"]), "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["costs.py", *common, *arguments])
        costs.main()
        return list(measured)

    assert run_costs() == ["step_to_full", "peak"]
    path = tmp_path / "tiny" / "costs.json"
    assert json.loads(path.read_text()) == {"lora/qv": {"step_to_full": 1.0, "peak_bytes": 1}}
    assert run_costs() == []
    path.write_text('{"lora/qv": {"step_to_full": 1.0}}')
    assert run_costs() == ["peak"]
    assert run_costs("--again") == ["step_to_full", "peak"]


@pytest.mark.slow
def test_from_sweep_to_page(sources, tmp_path):
    chosen = ["full_finetuning/all", "bsr/spread-exact", "lora/qv-checkpointing", "alast/control-random_budgets"]
    run("sweep.py", sources, "--only", "full", "bsr_spread", "lora_qv", "alast")
    assert "seed 0" in run("run.py", sources, "--only", *chosen)
    results = sources["results"] / "tiny" / "colours"
    assert len(list(results.glob("full_finetuning--all/seed-*.json"))) == 2
    result = json.loads((results / "lora--qv-checkpointing" / "seed-0.json").read_text())
    assert set(result) == {"run_info", "train_info", "meta_info"} and result["train_info"]["status"] == "success"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    run("run.py", sources, "--only", *chosen)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.json")} == before
    run("run.py", sources, "--only", "bsr/spread-exact", "--seconds", "2")
    (timed,) = results.parent.glob("2-seconds/colours/bsr--spread-exact/seed-0.json")
    assert 2 <= json.loads(timed.read_text())["train_info"]["train_time"] < 10
    run("costs.py", sources, "--only", *chosen, "--repeats", "1")
    run("memory.py", sources, "--only", "bsr/spread-exact")
    run("report.py", sources, "--output", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert "| bsr/spread-exact |" in page and "| full |" in page
    assert "colours, by memory" in page and "| experiment | 2 s | epochs |" in page
    assert (tmp_path / "images" / "benchmark-tiny-colours.png").exists()


def test_the_pages_have_the_numbers_of_the_results(monkeypatch):
    spec = importlib.util.spec_from_file_location("comparison_report", FOLDER / "report.py")  # not another `report`
    report = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, report)
    spec.loader.exec_module(report)
    results = FOLDER / "results" / "cpu"
    costs, peaks = (json.loads((results / name).read_text()) for name in ("costs.json", "memory.json"))
    names = ("cifar10", "fashion-mnist", "flowers")
    tasks = {task: report.load_rows(results, task, costs) for task in names}
    by_seconds = {
        seconds: {task: report.load_rows(folder, task, costs) for task in names}
        for seconds, folder in report.budgets_in(results)
    }
    start = "<!-- benchmarks/method_comparison/report.py{} -->\n\n{}\n\n<!-- end -->"
    assert start.format("", report.front_table(tasks)) in (FOLDER.parents[1] / "README.md").read_text()
    tables = report.choice_tables(tasks, peaks, by_seconds)
    assert set(tables) == {"accuracy", "memory", "time"}
    for name, table in tables.items():
        assert "full fine-tuning" in table
        assert start.format(f": {name}", table) in (FOLDER.parents[1] / "docs" / "which_method.md").read_text()


def test_the_best_that_fits_is_bold():
    from report_memory import images_within, memory_table

    def row(name: str, accuracy: float):
        return SimpleNamespace(experiment=SimpleNamespace(name=name), accuracy=accuracy)

    mib = 2**20
    peaks = {"large": {"1": 100 * mib, "8": 600 * mib}, "small": {"1": 10 * mib, "8": 70 * mib}}
    assert [images_within(peaks["large"], limit) for limit in (64, 128, 512, 600)] == [0, 1, 1, 8]
    assert memory_table([row("small", 0.8), row("large", 0.9), row("unmeasured", 1.0)], peaks).splitlines()[2:] == [
        "| large | 90.0 | - | **1** | **1** | **1** |",
        "| small | 80.0 | **1** | 8 | 8 | 8 |",
    ]


def test_a_schedule_over_the_clock(monkeypatch):
    import time_budget

    now = [100.0]
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now[0])
    budget = time_budget.TimeBudget(60, warmup=0.1)
    control = SimpleNamespace(should_training_stop=False)
    found = []
    for second in (0, 3, 6, 33, 60, 90):
        now[0] = 100.0 + second
        budget.on_step_end(None, None, control)
        found.append((round(budget.rate(0), 3), control.should_training_stop))
    assert found == [(0.01, False), (0.5, False), (1.0, False), (0.5, False), (0.0, True), (0.0, True)]


def test_a_suite_for_peft(tmp_path, monkeypatch):
    import upstream

    monkeypatch.setattr(sys, "argv", ["upstream.py", "--protocol", "cpu", "--output", str(tmp_path / "suite")])
    upstream.main()
    result = json.loads((tmp_path / "suite/results/lora--qv-random_seed_1.json").read_text())
    assert {"experiment_name", "peft_branch", "train_config", "peft_config"} <= set(result["run_info"])
    assert "accelerator_memory_max" not in result["train_info"], "there was no accelerator"
    folder = tmp_path / "suite/experiments" / result["run_info"]["experiment_name"]
    config = PeftConfig.from_pretrained(str(folder))
    assert config.peft_type == "LORA"
    assert json.loads((folder / "training_params.json").read_text())["seed"] == 1
