"""timm's architectures in a TimmWrapper, tiny, with random weights; and their section in docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

EVERY, MLP, ATTENTION = "exact, max", "exact (mlp only), max (mlp only)", "exact (attention only), max (attention only)"
STAGES = "exact (mlp only), max"
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
WINDOWS = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
TWO_STAGES = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1)}


class Tokens(NamedTuple):
    """An architecture in which tokens can be dropped, its arguments, and what is found at attach."""

    architecture: str
    arguments: Mapping[str, object] = MappingProxyType({})
    prefix: int = 1
    positions: bool = False
    lean: str = EVERY
    side: int = 32


class Blocks(NamedTuple):
    """An architecture without token reduction, its arguments, the probe's reason and what runs lean."""

    architecture: str
    arguments: Mapping[str, object]
    reason: str
    lean: str = STAGES
    side: int = 32


class Refused(NamedTuple):
    """An architecture that is refused, its arguments and the probe's reason."""

    architecture: str
    arguments: Mapping[str, object]
    reason: str


SUPPORTED = {
    "timm_vit": Tokens("vit_tiny_patch16_224"),
    "timm_vit_bare": Tokens("vit_tiny_patch16_224"),
    "timm_vit_layer_scale": Tokens("vit_tiny_patch16_224", {"init_values": 0.1}),
    "timm_vit_mean": Tokens("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, prefix=0),
    "timm_vit_registers": Tokens("vit_tiny_patch16_224", {"reg_tokens": 3, "dynamic_img_size": True}, prefix=4),
    "timm_reg4_gap": Tokens("vit_medium_patch16_reg4_gap_256", prefix=4),
    "timm_dinov2_reg4": Tokens("vit_small_patch14_reg4_dinov2", prefix=5),
    "timm_rope_reg4": Tokens("vit_betwixt_patch16_rope_reg4_gap_256", prefix=4, positions=True),
    "timm_deit3": Tokens("deit3_small_patch16_224"),
    "timm_deit_distilled": Tokens("deit_tiny_distilled_patch16_224", prefix=2),
    "timm_dinov2_swiglu": Tokens("vit_giant_patch14_dinov2"),
    "timm_clip_quickgelu": Tokens("vit_base_patch16_clip_quickgelu_224"),
    "timm_siglip": Tokens("vit_base_patch16_siglip_224", prefix=0),
    "timm_siglip_bare": Tokens("vit_base_patch16_siglip_224", prefix=0),
    "timm_siglip2": Tokens("vit_so400m_patch14_siglip_gap_224", {"mlp_ratio": 2.5}, prefix=0),
    "timm_dinov3": Tokens("vit_small_patch16_dinov3", {"num_reg_tokens": 2}, prefix=3, positions=True),
    "timm_dinov3_bare": Tokens("vit_small_patch16_dinov3", prefix=5, positions=True),
    "timm_dinov3_bias": Tokens("vit_small_patch16_dinov3_qkvb", prefix=5, positions=True),
    "timm_dinov3_swiglu": Tokens("vit_small_plus_patch16_dinov3", prefix=5, positions=True),
    "timm_eva02": Tokens("eva02_tiny_patch14_224", positions=True),
    "timm_eva02_norms": Tokens("eva02_base_patch14_224", positions=True, lean=ATTENTION),
    "timm_eva02_clip": Tokens("eva02_base_patch16_clip_224", positions=True, lean=ATTENTION),
    "timm_pe_core": Tokens("vit_pe_core_tiny_patch16_384", positions=True),
    "timm_pe_lang": Tokens("vit_pe_lang_large_patch14_448", positions=True),
    "timm_pe_spatial": Tokens("vit_pe_spatial_tiny_patch16_512", positions=True),
    "timm_naflex": Tokens("naflexvit_base_patch16_gap", {"img_size": None}, prefix=4),
    "timm_naflex_siglip": Tokens("naflexvit_base_patch16_siglip", {"img_size": None}, prefix=0),
    "timm_vitamin": Tokens("vitamin_small_224", prefix=0, lean=ATTENTION, side=64),
}
NO_REDUCTION = {
    "timm_beit": Blocks("beit_base_patch16_224", PLAIN, "its blocks use the position of a token inside", EVERY),
    "timm_swin": Blocks("swin_tiny_patch4_window7_224", WINDOWS, "it has stages: 3 lists of blocks"),
    "timm_swinv2": Blocks("swinv2_tiny_window8_256", WINDOWS, "it has stages: 3 lists of blocks"),
    "timm_hiera": Blocks("hiera_tiny_224", {"img_size": (64, 64), **TWO_STAGES}, "block 1 maps", side=64),
    "timm_hieradet": Blocks("hieradet_small", TWO_STAGES, "its first block gets (2, 16, 16, 16)", side=64),
    "timm_sam": Blocks("samvit_base_patch16", PLAIN, "its first block gets (2, 4, 4, 32)"),
    "timm_convnext": Blocks(
        "convnext_tiny",
        {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 32]},
        "it has no list of equal blocks",
        MLP,
        side=64,
    ),
}
REFUSED = {
    "timm_convnext_conv_mlp": Refused(
        "convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 32]}, "it has no list of equal blocks"
    ),
}


def arguments_of(case: Tokens | Blocks | Refused) -> dict[str, object]:
    """What `timm.create_model` gets."""
    if not isinstance(case, Tokens):
        return dict(case.arguments)
    if case.architecture.startswith("vitamin"):
        return {"img_size": case.side}
    given = {**PLAIN, **case.arguments}
    return {name: value for name, value in given.items() if value is not None}


def section() -> str:
    """The section of the page. Its rows are what `test_timm.py` compares with the models."""
    lines = [_INTRODUCTION, *_table(("family", "architecture", "special", "positions", "lean"))]
    for name, case in SUPPORTED.items():
        positions = "side inputs" if case.positions else "not in blocks"
        lines.append(_row(name, f"`{case.architecture}`", f"{case.prefix} + 0", positions, case.lean))
    lines += ["", "Without token reduction:", "", *_table(("family", "architecture", "reason", "lean"))]
    lines += [_row(name, f"`{c.architecture}`", c.reason, c.lean) for name, c in NO_REDUCTION.items()]
    lines += ["", "Refused:", "", *_table(("family", "architecture", "reason"))]
    lines += [_row(name, f"`{c.architecture}`", c.reason) for name, c in REFUSED.items()]
    return "\n".join(lines)


def _table(names: tuple[str, ...]) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_INTRODUCTION = """## timm

Architectures of timm in a `TimmWrapperForImageClassification` (`_bare`: `TimmWrapperModel`), tiny and with random
weights, in an environment of their own: `make test-timm`. Each passes the checks above; scores are from `sdpa`. Where
less than both halves run lean, this is why:

- EVA-02 base and CLIP have a norm inside their MLP, ViTamin a norm and a gate in other modules: the MLP runs stock.
- BEiT and SAM compute a bias from the tokens' places inside their attention, so no token can be dropped.

Their gradient checkpointing (`set_grad_checkpointing`) works with `keep_rate=1.0` and `gradient_tokens=1.0`; otherwise
the backward pass raises an error that says so. ConvNeXt with 1 x 1 convolutions as MLP is refused.

timm 1.0.31, torchvision 0.28.0 without its compiled operators, torch 2.13.0+cpu, transformers 5.23.0.
"""
