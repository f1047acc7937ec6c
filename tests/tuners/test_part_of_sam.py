"""A whole SAM with an adapter on its image encoder: prompts in, masks out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import SamConfig, SamModel

from peft_bsr import BSRConfig

ROOT = Path(__file__).parents[2]
LAST = {"part": "vision_encoder", "keep_rate": 1.0, "trainable_blocks": "last:2"}
LOAD = """
import sys, torch
from transformers import SamModel
import peft_bsr
from peft import PeftModel

model = PeftModel.from_pretrained(SamModel.from_pretrained("base"), "adapter", is_trainable=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load("batch.pt")).pred_masks, "masks.pt")
"""


def make_sam() -> SamModel:
    """Windows of 2 x 2 patches in two of four blocks."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 64, "image_size": 32}
    vision |= {"patch_size": 8, "output_channels": 16, "num_pos_feats": 8, "window_size": 2}
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision["global_attn_indexes"] = [1, 3]
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).eval()


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    return {"pixel_values": images, "input_points": 32 * torch.rand(2, 1, 1, 2, generator=generator)}


def masks_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).pred_masks


def train_step(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step towards masks of the left half; the gradients."""
    model.train().zero_grad()
    masks = model(**batch, multimask_output=False).pred_masks
    truth = torch.zeros_like(masks)
    truth[..., : masks.shape[-1] // 2] = 1
    binary_cross_entropy_with_logits(1e3 * masks, truth).backward()  # tiny random masks are near zero
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    model.eval()
    return found


def test_trained_saved_loaded_and_disabled(tmp_path):
    base, batch = make_sam(), make_batch()
    base.save_pretrained(tmp_path / "base")
    torch.save(batch, tmp_path / "batch.pt")
    stock = masks_of(base.requires_grad_(False), batch)
    model = get_peft_model(base, BSRConfig(**LAST))
    assert torch.equal(masks_of(model, batch), stock)
    train_step(model, batch)
    expected = masks_of(model, batch)
    assert not torch.equal(expected, stock)
    with model.disable_adapter():
        assert torch.equal(masks_of(model, batch), stock)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["part"] == "vision_encoder"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env=environment, check=True)  # a fresh process
    assert torch.equal(torch.load(tmp_path / "masks.pt"), expected)
    assert torch.equal(masks_of(model.unload(), batch), stock)


def test_its_gradients_are_those_of_stock_blocks():
    batch = make_batch()
    for settings in ({}, {"trainable": "lora", "init_weights": False}):
        found = []
        for lean in ("off", "exact", "max"):
            torch.manual_seed(3)
            found.append(train_step(get_peft_model(make_sam(), BSRConfig(**LAST, **settings, lean=lean)), batch))
        stock = found[0]
        largest = max(float(gradient.abs().max()) for gradient in stock.values())
        assert largest > 0
        for gradients in found[1:]:
            assert gradients.keys() == stock.keys()
            for name, gradient in stock.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_the_mask_decoder_trains_and_is_saved_with_it(tmp_path):
    batch = make_batch()
    model = get_peft_model(make_sam(), BSRConfig(**LAST, modules_to_save=["mask_decoder"]))
    assert [name for name, p in model.named_parameters() if p.requires_grad and "mask_decoder" in name]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    (1e3 * model.train()(**batch).pred_masks).square().mean().backward()
    optimizer.step()
    expected = masks_of(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_sam(), tmp_path, is_trainable=True).eval()
    assert torch.equal(masks_of(loaded, batch), expected)
