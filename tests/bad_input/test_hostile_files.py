"""Files that are not meant well, with the right digests or none: refused in time, the model bit for bit as before."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file

from peft_bsr import AdapterFileError, ConfigError, HubError, PeftBsrError, check_adapter
from peft_bsr.hub import load_base
from peft_bsr.tuners.alast.schedule import check_state
from peft_bsr.tuners.base.base_model import with_settings
from tests.bad_input.conftest import CONFIGS, make_vit, unseal
from tests.bad_input.fuzz import KINDS, fuzz
from tests.tuners.conftest import assert_same_state, state_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BOMB = r"^([\w.]|[\w.])*!$"
STATE = "base_model.model.vit.layers.0.token_router.bsr_state"
pytestmark = pytest.mark.skipif(
    not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"),
    reason="peft 0.20 has no place to look at weights before they are loaded",
)


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`copied("bsr", change, r=3)`: an adapter's folder with other tensors and settings, without digests."""

    def copy(method: str, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **values: Any) -> Path:
        shutil.copytree(saved(method), tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / WEIGHTS)
        if change is not None:
            change(tensors)
            save_file(tensors, tmp_path / "adapter" / WEIGHTS)
        unseal(tmp_path / "adapter", **values)
        return tmp_path / "adapter"

    return copy


def refused(folder: Path, error: type[PeftBsrError] = AdapterFileError) -> str:
    base = make_vit()
    before = state_of(base)
    with pytest.raises(error) as found:
        PeftModel.from_pretrained(base, folder)
    assert_same_state(base, before)
    return str(found.value)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("bsr", "vit.embeddings.cls_token"),
        ("bsr", "vit.layers.3.mlp.fc1.base_layer.weight"),
        ("alast", "vit.embeddings.cls_token"),
        ("synqt", "vit.layers.3.mlp.fc2.weight"),
    ],
)
def test_weights_of_the_base_model_are_not_taken_from_a_file(method, key, copied):
    shape = make_vit().state_dict()[key.replace(".base_layer", "")].shape
    folder = copied(method, lambda tensors: tensors.update({f"base_model.model.{key}": torch.full(shape, 7.0)}))
    assert f"{key} are in the file, but not in this adapter" in refused(folder)


@pytest.mark.parametrize(("method", "dtype"), [("bsr", torch.int32), ("alast", torch.bool), ("synqt", torch.complex64)])
def test_other_kinds_of_numbers_are_refused(method, dtype, copied):
    name = "base_model.model.classifier.synqt_params.classifier.bias" if method == "synqt" else None
    name = name or "base_model.model.classifier.bsr_params.bias"
    folder = copied(method, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"{dtype} instead of torch.float32 have an incompatible dtype" in refused(folder)


def test_another_floating_point_type_is_taken(copied):
    folder = copied("bsr", lambda tensors: tensors.update({n: t.to(torch.float16) for n, t in tensors.items()}))
    PeftModel.from_pretrained(make_vit(), folder)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("bsr", {"modules_to_save": ["layernorm"]}),
        ("alast", {"train_embeddings": True}),
        ("lora", {"modules_to_save": ["patch_embeddings", "layernorm"], "trainable_blocks": "every:1", "layout": None}),
    ],
)
def test_a_module_that_the_file_lacks_leaves_nothing_behind(method, values, copied):
    assert "missing in the file" in refused(copied(method, fingerprint=None, **values))


@pytest.mark.parametrize(
    ("name", "pattern"), [("target_modules", BOMB), ("exclude_modules", "(a" * 300_000)], ids=["bomb", "long"]
)
def test_a_pattern_of_a_file_is_never_run(name, pattern, copied):
    begin = time.perf_counter()
    folder = copied("bsr", **{name: pattern})
    PeftModel.from_pretrained(make_vit(), folder)  # `layout` says what trains
    unseal(folder, layout=None)
    assert f"`{name}` is a regular expression, which is not accepted from a file" in refused(folder, ConfigError)
    unseal(folder, **{name: None, "modules_to_save": [pattern]})
    assert "is not a module's name" in refused(folder, ConfigError)
    assert time.perf_counter() - begin < 10


SIZES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 60_000}),
    ("synqt", {"num_queries": 60_000}),
    ("synqt", {"bottleneck": 60_000}),
    ("synqt", {"attention_bottleneck": 60_000}),
    ("tasks", {"tasks": [{"name": "zoo", "num_outputs": 200_000}, {"name": "digits", "num_outputs": 4}]}),
    ("tasks", {"moe": {"num_experts": 60_000}}),
]


@pytest.mark.parametrize(("method", "values"), SIZES, ids=[f"{m}-{next(iter(v))}" for m, v in SIZES])
def test_sizes_are_compared_with_the_file_before_memory_is_taken(method, values, copied, monkeypatch):
    folder = copied(method, **values)
    taken: list[Any] = []
    for make in ("empty", "zeros", "full"):
        real = getattr(torch, make)
        monkeypatch.setattr(torch, make, lambda *a, _real=real, **k: taken.append(a) or _real(*a, **k))
    with pytest.raises(AdapterFileError, match="does not match its adapter_config"):
        check_adapter(folder)
    base = make_vit()
    taken.clear()
    with pytest.raises(AdapterFileError, match="does not match its adapter_config"):
        PeftModel.from_pretrained(base, folder)
    assert all(sum(torch.Size(a[0]) if isinstance(a[0], (list, torch.Size)) else [0]) < 10_000 for a in taken if a)


def test_a_file_that_is_far_too_large_is_not_read(copied, monkeypatch):
    folder = copied("bsr", lambda tensors: tensors.update({"base_model.model.more": torch.zeros(2**20)}))
    monkeypatch.setattr("peft.utils.save_and_load.safe_load_file", None)
    assert "the file has" in refused(folder)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("synqt", {"feature_scale": 1e308}),
        ("synqt", {"num_queries": 10**30}),
        ("lora", {"r": 10**6}),
        ("lora", {"lora_alpha": 1e300}),
        ("alast", {"alpha": 10**400}),
        ("alast", {"token_multiple": 10**12}),
        ("bsr", {"trainable_blocks": "last:1000000000000"}),
        ("bsr", {"trainable_blocks": [1] * 100_000}),
        ("synqt", {"keep_rate": ["x"] * 100_000}),
        ("tasks", {"tasks": [{"name": "a", "num_outputs": 1}] * 100_000}),
        ("tasks", {"moe": {"noise": 1e300}}),
        ("bsr", {"labels": ["x"] * 300_000}),
        ("bsr", {"labels": "xyz"}),
        ("bsr", {"labels": [1, 2, 3]}),
        ("bsr", {"fingerprint": 3}),
        ("bsr", {"layout": {"blocks.3.mlp.0": "vit.layers.3.mlp.fc1"}, "trainable": "x"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_numbers_and_lists_have_ends(method, values, copied):
    refused(copied(method, **values), ConfigError)


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        (0, 1, 7.0),
        (0, 1, -1.0),
        (1, 1, 5.0),  # one importance among NaN
        (2, 0, float("inf")),
        (3, 0, 2.0),
        (4, 0, -3.0),
        (4, 0, 1e300),
        (4, 2, 0.5),
    ],
)
def test_a_state_of_alast_out_of_its_range(row, column, value, saved):
    packed = load_file(saved("alast") / WEIGHTS)[STATE]
    assert check_state(packed, 4, CONFIGS["alast"]) == []
    packed.view(torch.float64)[row, column] = value
    assert check_state(packed, 4, CONFIGS["alast"]) == ["the state of the budgets is out of its range"]


def test_a_state_in_which_no_block_trains(copied):
    folder = copied("alast", lambda tensors: tensors[STATE][3].zero_())
    assert "bsr_state.default: the state of the budgets is out of its range" in refused(folder)


def test_a_state_of_another_shape_or_place(copied):
    folder = copied("alast", lambda tensors: tensors.update({STATE: tensors[STATE][:, :2].contiguous()}))
    assert "have another shape" in refused(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors[STATE.replace(".0.", ".1.")] = torch.zeros(5, 4, dtype=torch.int64)
    tensors.pop(STATE)
    save_file(tensors, folder / WEIGHTS)
    assert "are in the file, but not in this adapter" in refused(folder)


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "transformers", "base_model_class": "RagRetriever"},
        {"parent_library": "transformers.utils.hub", "base_model_class": "os"},
        {"parent_library": "transformers", "base_model_class": "pipeline"},
        {"parent_library": "transformers", "base_model_class": "AutoModel"},
    ],
    ids=lambda mapping: mapping["base_model_class"],
)
def test_only_models_of_transformers_are_made(mapping, tmp_path):
    config = CONFIGS["bsr"].__class__(auto_mapping=mapping, base_model_name_or_path=str(tmp_path))
    with pytest.raises(HubError, match=r"as the class of its base model; it is not a model"):
        load_base(config)


@pytest.mark.parametrize("mapping", [{"parent_library": 5, "base_model_class": 6}, {"parent_library": "os"}, [1], "x"])
def test_another_mapping_means_an_image_classifier(mapping, tmp_path):
    make_vit().save_pretrained(tmp_path)
    config = CONFIGS["bsr"].__class__(auto_mapping=mapping, base_model_name_or_path=str(tmp_path))
    assert type(load_base(config)).__name__ == "ViTForImageClassification"


def test_code_beside_a_base_model_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", None)
    about = {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(HubError, match="cannot be read"):
        load_base(CONFIGS["bsr"].__class__(base_model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**6}, {"hidden_size": 64}, {"image_size": 10**6}], ids=str)
def test_settings_do_not_make_a_larger_model(changes):
    own = make_vit().config
    with pytest.raises(AdapterFileError, match="the model would be far larger"):
        with_settings(own, changes)
    assert with_settings(own, {"image_size": 64, "num_hidden_layers": 2}).image_size == 64


@pytest.mark.parametrize("kind", ["flips", "tensors", "settings"])
def test_a_little_of_the_fuzz(kind):
    configs, _, damage, may_load = KINDS[kind]
    outcomes, wrong, _, _ = fuzz(configs, 9, damage, may_load=may_load, seed=1)
    assert wrong == []
    assert outcomes["refused by AdapterFileError"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.parametrize("method", ["bsr", "alast", "synqt"])
def test_any_value_is_taken_or_told(method, saved, tmp_path):
    shutil.copytree(saved(method), tmp_path / "adapter")
    names = sorted({*json.loads((tmp_path / "adapter" / CONFIG).read_text())} - {"peft_type"})
    whole = (tmp_path / "adapter" / CONFIG).read_text()

    @given(st.sampled_from(names), JSON)
    @settings(max_examples=30, deadline=2000, database=None, derandomize=True)
    def check(name: str, value: Any) -> None:
        (tmp_path / "adapter" / CONFIG).write_text(whole)
        unseal(tmp_path / "adapter")
        values = json.loads((tmp_path / "adapter" / CONFIG).read_text())
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**values, name: value}))
        with contextlib.suppress(PeftBsrError):
            check_adapter(tmp_path / "adapter")

    check()
