"""Damaged, foreign and dangerous adapter files: one clear error of our own, the base model bit for bit as before."""

from __future__ import annotations

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file

from peft_bsr import AdapterFileError, BSRConfig, ConfigError, UnsupportedModelError, check_adapter
from tests.bad_input.conftest import make_adapter, make_vit, unseal
from tests.tuners.conftest import assert_same_state, state_of

CHECKS_WEIGHTS = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")  # peft >= 0.21
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FC1 = "base_model.model.vit.layers.3.mlp.fc1"


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors in the file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        unseal(folder)

    return damage


def config(**values: Any) -> Callable[[Path], None]:
    """Change values in the configuration."""

    return lambda folder: unseal(folder, **values)


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


class Bomb:
    """What a pickled file can do."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


FILES: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("bsr", cut(WEIGHTS, 0.0), AdapterFileError, "'{weights}' is not a complete safetensors file"),
    ("bsr", cut(WEIGHTS, 0.01), AdapterFileError, "'{weights}' is not a complete safetensors file"),
    ("bsr", cut(WEIGHTS, 0.5), AdapterFileError, "'{weights}' is not a complete safetensors file"),
    ("synqt", cut(WEIGHTS, 0.999), AdapterFileError, "'{weights}' is not a complete safetensors file"),
    ("bsr", written(WEIGHTS, b"\x80\x04."), AdapterFileError, "'{weights}' is not a complete safetensors file"),
    ("bsr", written(WEIGHTS, pickle.dumps(Bomb())), AdapterFileError, "'{weights}' is not a complete safetensors file"),
    (
        "bsr",
        written(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
        AdapterFileError,
        "'{weights}' is not a complete safetensors file",
    ),
    ("bsr", pickled, AdapterFileError, "'{weights}' is missing; there is 'adapter_model.bin', but pickled files can"),
    ("synqt", pickled, AdapterFileError, "'{weights}' is missing; there is 'adapter_model.bin', but pickled files can"),
    (
        "bsr",
        weights(lambda t: t.pop(f"{FC1}.bsr_params.weight")),
        AdapterFileError,
        f"Adapter 'default': {FC1}.bsr_params.default.weight are missing in the file. The file is damaged, or",
    ),
    (
        "bsr",
        weights(lambda t: t.update({f"{FC1}.bsr_params.scale": torch.ones(1)})),
        AdapterFileError,
        f"Adapter 'default': {FC1}.bsr_params.scale are in the file, but not in this adapter.",
    ),
    (
        "bsr",
        weights(lambda t: t.update({f"{FC1}.bsr_params.weight": torch.ones(64, 16)})),
        AdapterFileError,
        f"Adapter 'default': {FC1}.bsr_params.default.weight (64, 16) instead of (64, 32) have another shape.",
    ),
    (
        "bsr",
        weights(lambda t: t[f"{FC1}.bsr_params.weight"].fill_(float("nan"))),
        AdapterFileError,
        f"Adapter 'default': {FC1}.bsr_params.default.weight are NaN or infinite.",
    ),
    (
        "lora",
        weights(lambda t: t[f"{FC1}.bsr_params.lora_A"][0].fill_(float("inf"))),
        AdapterFileError,
        f"Adapter 'default': {FC1}.bsr_params.default.lora_A are NaN or infinite.",
    ),
    (
        "alast",
        weights(lambda t: t[f"{FC1}.bsr_params.bias"].fill_(float("nan"))),
        AdapterFileError,
        f"Adapter 'default': {FC1}.bsr_params.default.bias are NaN or infinite.",
    ),
    (
        "synqt",
        weights(lambda t: t["base_model.model.classifier.synqt_params.classifier.bias"].fill_(float("nan"))),
        AdapterFileError,
        "Adapter 'default': base_model.model.classifier.synqt_params.default.classifier.bias are NaN or infinite.",
    ),
    (
        "tasks",
        weights(lambda t: t.pop("base_model.model.classifier.bsr_params.heads.1.bias")),
        AdapterFileError,
        "Adapter 'default': base_model.model.classifier.bsr_params.default.heads.1.bias are missing in the file.",
    ),
    ("bsr", weights(dict.clear), AdapterFileError, "Adapter 'default': base_model.model.classifier.bsr_params"),
    ("lora", config(r=8), AdapterFileError, "'{weights}' does not match its adapter_config.json: `base_model"),
    ("bsr", config(trainable="lora"), AdapterFileError, "'{weights}' does not match its adapter_config.json: the"),
    ("synqt", config(layers=[1]), AdapterFileError, "Adapter 'default': "),
    ("synqt", config(num_queries=5), AdapterFileError, "'{weights}' does not match its adapter_config.json: `ba"),
    ("tasks", config(tasks=[{"name": "zoo", "num_outputs": 6}]), AdapterFileError, "'{weights}' does not match"),
    ("bsr", config(trainable_blocks=[1, 2]), ConfigError, "BSRConfig: `layout` names ['blocks.3.attention."),
    ("bsr", config(trainable_blocks=[1, 11]), ConfigError, "BSRConfig: `trainable_blocks=[1, 11]` asks for block 11"),
    ("bsr", config(keep_rate="half"), ConfigError, "BSRConfig: `keep_rate='half'` holds 'half'"),
    ("bsr", config(trainable=["full"]), ConfigError, "BSRConfig: `trainable=['full']` is unknown."),
    ("bsr", config(layout=[1]), ConfigError, "BSRConfig: `layout=[1]` must map each place to a module name"),
    ("bsr", config(task_type="NOPE"), ConfigError, "BSRConfig: Invalid task type: 'NOPE'."),
    ("alast", config(budget_range=3), ConfigError, "ALaSTConfig: `budget_range=3` must be two numbers"),
    ("synqt", config(layers=[0, 9]), ConfigError, "SynQTConfig: `layers=[0, 9]` asks for block 9"),
    ("tasks", config(tasks=7), ConfigError, "BSRConfig: `tasks=7` must name at least one task"),
]


@pytest.mark.parametrize(
    ("method", "damage", "error", "text"), FILES, ids=[f"{i}-{method}" for i, (method, *_) in enumerate(FILES)]
)
def test_damaged_files(method, damage, error, text, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    shutil.copytree(saved(method), folder)
    damage(folder)
    if not CHECKS_WEIGHTS and text.startswith("Adapter"):
        pytest.skip("peft 0.20 has no place to look at weights before they are loaded")
    text = text.replace("{weights}", str(folder / WEIGHTS))
    base, other = make_vit(), make_adapter("synqt" if method == "synqt" else "bsr")
    before, with_another = state_of(base), state_of(other)
    with pytest.raises(error) as found:
        PeftModel.from_pretrained(base, folder)
    assert str(found.value).startswith(text)
    assert_same_state(base, before)
    assert not Path("exploded").exists()
    if method in ("bsr", "synqt"):  # beside another adapter
        with pytest.raises(error):
            other.load_adapter(str(folder), "second")
        assert list(other.peft_config) == ["default"]
        assert_same_state(other, with_another)


OTHER = "The adapter was trained on a different model than this one, which has "
WRONG_MODELS = [
    ("bsr", lambda: make_vit(depth=2), ConfigError, "BSRConfig: `trainable_blocks=[1, 3]` asks for block 3"),
    (
        "bsr",
        lambda: make_vit(num_labels=7),
        AdapterFileError,
        "The adapter's head has 3 classes, this model's has 7. `peft_bsr.load(adapter)`",
    ),
    ("bsr", lambda: make_vit(hidden_size=16), AdapterFileError, OTHER + "width 16 instead of 32"),
    ("lora", lambda: make_vit(intermediate_size=32), AdapterFileError, OTHER + "mlp 32 instead of 64"),
    ("synqt", lambda: make_vit(hidden_size=16), AdapterFileError, OTHER + "width 16 instead of 32"),
    ("synqt", lambda: make_vit(hidden_act="relu"), AdapterFileError, OTHER + "activation 'relu' instead of 'gelu'"),
    ("bsr", lambda: make_vit(num_attention_heads=2), AdapterFileError, OTHER + "heads 2 instead of 4"),
    ("bsr", lambda: make_vit(depth=6), AdapterFileError, OTHER + "depth 6 instead of 4"),
    ("synqt", lambda: make_vit(depth=2), ConfigError, "SynQTConfig: `layers=[1, 3]` asks for block 3"),
    ("synqt", lambda: make_vit().vit, UnsupportedModelError, "ViTModel: the head of SynQT takes the place of the"),
    ("alast", lambda: make_vit(depth=6), AdapterFileError, OTHER + "depth 6 instead of 4"),
    ("bsr", lambda: torch.nn.Linear(2, 2), UnsupportedModelError, "Linear is not supported"),
]


@pytest.mark.parametrize(
    ("method", "make", "error", "text"), WRONG_MODELS, ids=[f"{i}-{m}" for i, (m, *_) in enumerate(WRONG_MODELS)]
)
def test_files_of_another_model(method, make, error, text, saved):
    if not CHECKS_WEIGHTS and text.startswith("Adapter"):
        pytest.skip("peft 0.20 has no place to look at weights before they are loaded")
    torch.manual_seed(0)
    base = make()
    before = state_of(base)
    with pytest.raises(error) as found:
        PeftModel.from_pretrained(base, saved(method))
    assert str(found.value).startswith(text)
    assert_same_state(base, before)


def test_a_checkpoint_that_does_not_fit_leaves_the_adapter_that_trains(saved, tmp_path):
    if not CHECKS_WEIGHTS:
        pytest.skip("peft 0.20 has no place to look at weights before they are loaded")
    shutil.copytree(saved("bsr"), tmp_path / "adapter")
    weights(lambda t: t[f"{FC1}.bsr_params.weight"].fill_(float("nan")))(tmp_path / "adapter")
    model = make_adapter("bsr")
    before = state_of(model)
    with pytest.raises(AdapterFileError, match="NaN"):
        model.load_adapter(str(tmp_path / "adapter"), "default")
    assert_same_state(model, before)


ALONE = [
    (lambda f: (f / CONFIG).unlink(), "'{config}' cannot be read (FileNotFoundError"),
    (lambda f: (f / WEIGHTS).unlink(), "'{weights}' is missing. Use another checkpoint"),
    (written(CONFIG, b""), "'{config}' cannot be read (JSONDecodeError"),
    (written(CONFIG, b'{"peft_type": "BSR"'), "'{config}' cannot be read (JSONDecodeError"),
    (written(CONFIG, b"\xff\xfe{}"), "'{config}' cannot be read ("),
    (written(CONFIG, b"[" * 100_000), "'{config}' cannot be read (RecursionError"),
    (written(CONFIG, b"[1]"), "'{config}' is not the configuration of a peft_bsr adapter: its `peft_type` is None"),
    (config(peft_type=None), "'{config}' is not the configuration of a peft_bsr adapter: its `peft_type` is None"),
    (config(peft_type="LORA"), "'{config}' is not the configuration of a peft_bsr adapter: its `peft_type` is 'LORA'"),
    (
        config(peft_type=["BSR"]),
        "'{config}' is not the configuration of a peft_bsr adapter: its `peft_type` is ['BSR']",
    ),
]


@pytest.mark.parametrize(("damage", "text"), ALONE, ids=[str(i) for i in range(len(ALONE))])
def test_what_peft_would_trip_over_is_told_by_check_adapter(damage, text, saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved("bsr"), folder)
    check_adapter(folder)
    damage(folder)
    text = text.replace("{weights}", str(folder / WEIGHTS)).replace("{config}", str(folder / CONFIG))
    with pytest.raises(AdapterFileError) as found:
        check_adapter(folder)
    assert str(found.value).startswith(text)


def test_settings_of_a_newer_version_are_left_out_with_a_warning(saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved("bsr"), folder)
    config(sharpness=3)(folder)
    with pytest.warns(UserWarning, match="sharpness"):
        loaded = PeftModel.from_pretrained(make_vit(), folder)
    assert isinstance(loaded.peft_config["default"], BSRConfig)
