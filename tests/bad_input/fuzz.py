"""Adapter files with thousands of damages, and what became of them; prints a table and ends with 1 if one got through.

python -m tests.bad_input.fuzz flips     # 300 flipped bits over three methods
python -m tests.bad_input.fuzz tensors   # 300 extra, missing, reshaped and other tensors, without digests
python -m tests.bad_input.fuzz settings  # 2500 variants of adapter_config.json, without digests
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_bsr import ALaSTConfig, BSRConfig, MoEConfig, PeftBsrError, SynQTConfig, check_adapter
from tests.bad_input.conftest import make_vit, unseal
from tests.tuners.conftest import assert_same_state, state_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = {"depth": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
METHODS = {
    "bsr": BSRConfig(trainable_blocks=[1], reduction_blocks=[1], init_weights=False),
    "alast": ALaSTConfig(trainable_blocks_per_step=1),
    "synqt": SynQTConfig(),
}
OTHERS = {
    "lora": BSRConfig(trainable_blocks=[1], trainable="lora", r=2),
    "moe": BSRConfig(trainable_blocks=[1], tasks={"zoo": 3}, moe=MoEConfig(num_experts=2, top_k=1)),
}
NUMBERS = [0, 1, -1, 2, 3, 0.5, 1.5, 2**31, 2**63, 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf"), 60_000]
TEXTS = ["", "x", "full", "lora", "every:1", "last:1", "last:999999999999", "x" * 1000, "x" * 10**6, "../..", "\x00"]
TEXTS += [r"^([\w.]|[\w.])*!$", "(" * 5000, "(a{1,1000}){1,1000}", "all-linear", "paper", "int8", "mid_block"]
LISTS = [[], [0], [1], [1, 1], [-1], [10**12], ["x"], [None], [[]], [0.5], [{}], [1] * 10**5, ["x"] * 10**5]
VALUES = [None, True, False, *NUMBERS, *TEXTS, *LISTS, {}, {"a": 1}, {"a": {"b": [{}]}}, {"zoo": 10**9}]


class Refused(Exception):  # noqa: N818  (an outcome)
    """A file was refused by an error of ours."""


class Largest(TorchDispatchMode):
    """The largest tensor that was made inside, in bytes; without numbers it counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return output


class Case:
    """One saved adapter, its outputs, and a folder to damage a copy in.

    Args:
        config: Of the adapter.
        folder: To work in.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        self.saved, self.damaged = folder / "saved", folder / "damaged"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = get_peft_model(make_vit(**SMALL), copy.deepcopy(config)).eval()
        self.model.save_pretrained(self.saved)
        self.tasks = {"task": "zoo"} if getattr(config, "tasks", None) else {}
        self.expected = self.run(self.model)
        self.base = make_vit(**SMALL)
        self.before = state_of(self.base)
        self.base_bytes = sum(p.numel() * p.element_size() for p in self.base.parameters())

    def run(self, model: Any) -> Any:
        """Outputs for two images."""
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output = model(pixel_values=images, **self.tasks)
        return output.logits if getattr(output, "logits", None) is not None else output[0]

    def load(self) -> Any:
        """The damaged copy on the base model.

        Raises:
            Refused: By an error of ours; the base model was looked at and is bit for bit as before.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of settings that nobody knows
                check_adapter(self.damaged)
                return PeftModel.from_pretrained(self.base, self.damaged).eval()
        except PeftBsrError as error:
            assert_same_state(self.base, self.before)
            raise Refused(type(error).__name__) from error

    @contextmanager
    def copy(self) -> Any:
        """Inside there is a fresh copy to damage; afterwards the base model is bare again."""
        shutil.rmtree(self.damaged, ignore_errors=True)
        shutil.copytree(self.saved, self.damaged)
        try:
            yield self.damaged
        finally:
            if hasattr(self.base, "peft_config"):
                self.base = make_vit(**SMALL)
                self.before = state_of(self.base)


def flip(folder: Path, chance: random.Random) -> None:
    """Turn one bit of one of the two files."""
    path = folder / chance.choice([WEIGHTS, WEIGHTS, CONFIG])
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def change_tensors(folder: Path, chance: random.Random) -> None:
    """Add, take out, reshape or retype tensors, or put in one of the base model's."""
    tensors = load_file(folder / WEIGHTS)
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    kind = chance.choice(["extra", "base", "missing", "longer", "flat", "kind", "renamed", "moved"])
    while kind in ("flat", "missing", "renamed") and ("bsr_state" in name or (kind == "flat" and tensor.ndim < 2)):
        kind = chance.choice(["extra", "longer", "base"])  # a state may be missing: a schedule begins again
    if kind == "extra":
        tensors[f"{name}_{chance.randrange(9)}"] = torch.zeros(chance.randrange(1, 9))
    elif kind == "base":
        key, weight = chance.choice(list(make_vit(**SMALL).state_dict().items()))
        tensors[f"base_model.model.{key}"] = torch.zeros(weight.shape)
    elif kind == "missing":
        del tensors[name]
    elif kind == "longer":
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == "flat":
        tensors[name] = tensor.flatten()
    elif kind == "kind":
        tensors[name] = tensor.to(chance.choice([torch.bool, torch.complex64, torch.int32]))
    else:
        tensors[
            name.replace(".layers.1.", ".layers.0.") if kind == "moved" and ".layers.1." in name else f"{name}x"
        ] = tensors.pop(name)
    save_file(tensors, folder / WEIGHTS)
    unseal(folder)


def change_settings(folder: Path, chance: random.Random) -> None:
    """Other values, one to three of them, at any depth; names that nobody knows, or too few."""
    values = json.loads((folder / CONFIG).read_text())
    values["digests"] = chance.choice([None, None, None, 5, {"weights": "x"}])
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        name = chance.choice(sorted(values))
        inner = values[name] if isinstance(values[name], dict) and values[name] and chance.random() < 0.5 else values
        key = chance.choice(sorted(inner))
        if chance.random() < 0.05:
            inner.pop(key)
        else:
            inner[f"{key}_" if chance.random() < 0.03 else key] = chance.choice(VALUES)
    values["peft_type"] = json.loads((folder / CONFIG).read_text())["peft_type"]  # PEFT reads it before we are asked
    (folder / CONFIG).write_text(json.dumps(values))


def fuzz(
    configs: dict[str, Any],
    number: int,
    damage: Callable[[Path, random.Random], None],
    *,
    may_load: bool,
    seed: int = 0,
) -> tuple[Counter[str], list[str], float, float]:
    """Damage, load, look.

    Args:
        configs: Name -> configuration; they take turns.
        number: Damages in all.
        damage: Changes a folder.
        may_load: Whether a damaged adapter may load as another one: its settings were changed, not its tensors.
        seed: Of the damages.

    Returns:
        Outcomes by name, what should not have been, seconds of the slowest, and the largest tensor that was made, in
        sizes of the base model.
    """
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: Case(config, Path(folder, name)) for name, config in configs.items()}
        for index in range(number):
            name = list(cases)[index % len(cases)]
            case, chance = cases[name], random.Random(f"{seed} {index}")
            with case.copy() as damaged, Largest() as made:
                damage(damaged, chance)
                made.bytes, begin = 0, time.process_time()
                try:
                    model = case.load()
                    seconds = time.process_time() - begin
                    same = torch.equal(case.run(model), case.expected)
                    outcome = "loads as the same" if same else "loads as another"
                    if not same and not may_load:
                        wrong.append(f"{name} {index}: loads as something else")
                except Refused as refused:
                    seconds, outcome = time.process_time() - begin, f"refused by {refused}"
                except Exception as error:
                    seconds, outcome = time.process_time() - begin, "raw error"
                    wrong.append(f"{name} {index}: {type(error).__name__}: {str(error)[:150]}")
            slowest, largest = max(slowest, seconds), max(largest, made.bytes / case.base_bytes)
            if seconds > 2:
                wrong.append(f"{name} {index}: {seconds:.1f} s of processor time")
            if made.bytes > case.base_bytes:
                wrong.append(f"{name} {index}: a tensor of {made.bytes} bytes; the base model has {case.base_bytes}")
            outcomes[outcome] += 1
    return outcomes, wrong, slowest, largest


KINDS: dict[str, tuple[dict[str, Any], int, Callable[[Path, random.Random], None], bool]] = {
    "flips": (METHODS, 300, flip, False),
    "tensors": (METHODS, 300, change_tensors, False),
    "settings": (METHODS | OTHERS, 2500, change_settings, True),
}


def main() -> int:
    """Run one kind, or all; 1 if something got through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int)
    args = parser.parse_args()
    failed = False
    for kind in args.kinds or KINDS:
        configs, number, damage, may_load = KINDS[kind]
        begin = time.perf_counter()
        found = fuzz(configs, args.number or number, damage, may_load=may_load, seed=args.seed)
        outcomes, wrong, slowest, largest = found
        print(f"{kind}: {sum(outcomes.values())} over {', '.join(configs)} in {time.perf_counter() - begin:.0f} s")
        for outcome, times in outcomes.most_common():
            print(f"  {times:5d} {outcome}")
        print(f"  slowest {slowest:.2f} s of processor time, largest tensor {largest:.2f} of the base model")
        print(f"  {len(wrong)} that should not have been", *wrong[:20], sep="\n    ")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
