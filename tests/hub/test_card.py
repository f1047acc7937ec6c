from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image

from peft_bsr import AdapterError, ALaSTConfig, BSRConfig, SynQTConfig, add_facts
from peft_bsr.cost import Cost
from peft_bsr.errors import ReductionNotMergedWarning
from peft_bsr.hub.card import _hub_id

COSTS = {
    "full fine-tuning": Cost(100, 8 * 2**20, 1e9, 4e9, 2.0),
    "this adapter": Cost(10, 2**20, 0.5e9, 1e9, 0.5),
}


def saved(model, folder):
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_a_card_says_what_is_known_and_nothing_else(make_adapter, tmp_path):
    card = saved(make_adapter(), tmp_path / "adapter")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-classification"
    assert {"peft_bsr", "bsr"} <= set(card.data.tags)
    snippet = card.text.split("```python\n")[1]
    assert snippet.startswith("import peft_bsr\n")
    assert "Of 4 blocks, all weights of block 3 train" in card.text
    assert "At blocks 1 to 3, 50% of the patches stay" in card.text
    assert "at 32 x 32 px, 17 tokens become" in card.text
    assert "More Information Needed" not in card.text, "PEFT's blank template"
    for heading in ("## Results", "## Measured", "## Kept tokens"):
        assert heading not in card.text
    assert card.data.base_model is None, "a folder of this machine is no id on the Hub"
    assert str(tmp_path) not in card.content


def test_measured_facts_are_written(make_adapter, tmp_path):
    model = make_adapter()
    Image.new("RGB", (4, 4)).save(tmp_path / "strip.png")
    add_facts(model, dataset="user/beans", metrics={"accuracy": 0.9375})
    add_facts(model, costs=COSTS, conditions="CPU, batch 8.", picture=tmp_path / "strip.png")
    card = saved(model, tmp_path / "adapter")
    assert "- accuracy on user/beans: 0.9375" in card.text
    assert "| this adapter | 1 | 1 | 0.25 |" in card.text
    assert "CPU, batch 8." in card.text
    assert "](kept_tokens.png)" in card.text
    assert (tmp_path / "adapter" / "kept_tokens.png").exists()
    assert card.data.datasets == ["user/beans"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9375)


def test_tokens_are_counted_at_the_training_size(make_adapter, tmp_path):
    model = make_adapter(BSRConfig(reduction_blocks=[1], keep_rate=0.5, fuse_dropped=False))
    add_facts(model, image_size=(64, 32))
    assert "at 64 x 32 px, 33 tokens become 17." in saved(model, tmp_path / "adapter").text


def test_several_metrics_and_a_table_of_classes(make_adapter, tmp_path):
    model = make_adapter()
    metrics = {"test accuracy": 0.9, "test balanced_accuracy": 0.8}
    table = ("By class", ("class", "F1"), [("a|b", "0.5"), ("<b>", "1")])
    add_facts(model, dataset="user/beans", metrics=metrics, tables=[table])
    card = saved(model, tmp_path / "adapter")
    assert "- test balanced accuracy on user/beans: 0.8\n\n### By class\n\n| class | F1 |\n| --- | --- |\n" in card.text
    assert "| a&#124;b | 0.5 |\n| &lt;b&gt; | 1 |" in card.text
    found = [(one.dataset_split, one.metric_type, one.metric_value) for one in card.data.eval_results]
    assert found == [("test", "accuracy", 0.9), ("test", "balanced_accuracy", 0.8)]


def test_a_base_model_of_the_hub_is_linked(make_adapter, tmp_path):
    model = make_adapter()
    model.peft_config["default"].base_model_name_or_path = "google/vit-base-patch16-224"
    card = saved(model, tmp_path / "adapter")
    assert card.data.base_model == "google/vit-base-patch16-224"
    assert "base_model:adapter:google/vit-base-patch16-224" in card.data.tags
    assert "(https://huggingface.co/google/vit-base-patch16-224)" in card.text


def test_what_a_person_wrote_stays(make_adapter, tmp_path):
    model = make_adapter()
    path = tmp_path / "adapter" / "README.md"
    saved(model, tmp_path / "adapter")
    path.write_text(path.read_text().replace("---\n\n<!--", "---\n\nMy cats.\n\n<!--") + "\nThe end.\n")
    add_facts(model, metrics={"accuracy": 0.5})
    text = saved(model, tmp_path / "adapter").text
    assert text.index("My cats.") < text.index("- accuracy: 0.5") < text.index("The end.")
    assert text.count("## What it does") == 1
    path.write_text("---\nlicense: mit\n---\n\n# By hand\n")
    card = saved(model, tmp_path / "adapter")
    assert card.data.license == "mit"
    assert card.text.index("# By hand") < card.text.index("## What it does")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ALaSTConfig(), "In every training step, budgets decide which three quarters of the 4 blocks train"),
        (SynQTConfig(), "All 4 blocks are frozen; 4 learned queries per block read blocks 0 to 3"),
        (BSRConfig(keep_rate=1.0), "No tokens are dropped."),
        (BSRConfig(trainable="lora", reduction_blocks=[1]), "low-rank updates of block 3 train"),
        (BSRConfig(mode="full_view"), "Dropped tokens keep their place"),
    ],
    ids=["alast", "synqt", "all_tokens", "lora", "full_view"],
)
def test_every_method_has_words(config, sentence, make_adapter, tmp_path):
    assert sentence in saved(make_adapter(config), tmp_path / "adapter").text


@pytest.mark.parametrize(
    ("config", "is_merged", "differs"),
    [
        (BSRConfig(), True, True),
        (BSRConfig(keep_rate=1.0), True, False),
        (ALaSTConfig(), True, False),
        (SynQTConfig(), False, False),
        (BSRConfig(tasks={"digits": 4}), False, False),
    ],
    ids=["bsr", "all_tokens", "alast", "synqt", "tasks"],
)
def test_what_a_merge_would_change(config, is_merged, differs, make_adapter, tmp_path):
    model = make_adapter(config)
    limits = saved(model, tmp_path / "adapter").text.partition("## Limits")[2]
    assert ("Token reduction is not part of the weights" in limits) == differs
    assert ("It cannot be merged into the base model." in limits) != is_merged
    with nullcontext() if is_merged else pytest.raises(AdapterError), warnings.catch_warnings():
        warnings.simplefilter("ignore", ReductionNotMergedWarning)
        model.merge_and_unload()


def test_a_second_adapter_has_a_card_of_its_own(make_adapter, tmp_path):
    model = make_adapter()
    model.add_adapter("second", BSRConfig(keep_rate=0.25))
    model.save_pretrained(tmp_path / "both")
    assert "25% of the patches" in (tmp_path / "both" / "second" / "README.md").read_text()
    assert "50% of the patches" in (tmp_path / "both" / "README.md").read_text()


def test_facts_need_an_adapter_of_ours(make_model):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"no adapter 'default' of peft_bsr; it has \['default'\]"):
        add_facts(model, dataset="beans")
    with pytest.raises(TypeError, match="colour"):
        add_facts(get_peft_model(make_model(), BSRConfig()), colour="red")


def test_facts_travel_with_copies_and_stay_out_of_the_file(make_adapter):
    model = make_adapter()
    add_facts(model, dataset="beans")
    for reference in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert reference.peft_config["default"].facts.dataset == "beans"
    assert not {"facts", "attachment"} & model.peft_config["default"].to_dict().keys()


@pytest.mark.parametrize(
    ("name", "found"),
    [("user/model", "user/model"), ("/home/me/model", None), ("./user/model", None), ("digits", None), (None, None)],
)
def test_ids_and_folders(name, found):
    assert _hub_id(name) == found


def test_a_folder_that_looks_like_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert _hub_id("user/model") is None


def test_a_base_model_without_a_name(make_model, tmp_path):
    text = saved(get_peft_model(make_model(), BSRConfig(trainable_blocks=[3])), tmp_path).text
    assert "adapter of a ViTForImageClassification" in text and "`None`" not in text
    assert "The base model has no name: it was made in memory." in text


def test_the_picture_of_merged_tokens_is_described(make_adapter, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "strip.png")
    for reduction, words in (("drop", "dropped ones are shaded"), ("merge", "merged ones have the mean colour")):
        model = make_adapter(BSRConfig(trainable_blocks=[3], reduction=reduction))
        add_facts(model, picture=tmp_path / "strip.png")
        assert words in saved(model, tmp_path / reduction).text
