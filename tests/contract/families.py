"""Tiny random models of every family, with a batch for each, for the contract test and the compatibility page.

`SUPPORTED[name]()` creates a model in evaluation mode, always with the same weights. Parameters that are initialized to
constants (position biases, LayerScale) are random, because a check with zeros or ones would hide errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peft_bsr import with_head

WIDTH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
VIT = {**WIDTH, **IMAGE}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {**TEXT, "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE_TOKEN = 59  # its last word
WHISPER = {
    "d_model": 32,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 16,
    "max_source_positions": 24,
    "max_target_positions": 8,
    "vocab_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAVEFORM = {
    **WIDTH,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,  # drawn by NumPy, which no seed of torch sets
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_labels": 3,
}
STABLE = {**WAVEFORM, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}  # the large models: pre-norm
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2, 2, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SAM2 = {
    "image_size": [32, 32],
    "hidden_size": 16,
    "num_attention_heads": 1,
    "patch_kernel_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "window_positional_embedding_background_size": [2, 2],
    "num_query_pool_stages": 1,
    "blocks_per_stage": [1, 2],
    "embed_dim_per_stage": [16, 32],
    "num_attention_heads_per_stage": [1, 2],
    "window_size_per_stage": [4, 2],
    "global_attention_blocks": [2],
}
SAM3 = {
    "model_type": "sam3_vit_model",
    **WIDTH,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1, 3],
    "pretrain_image_size": 32,
}
DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_queries": 4,
}
_RANDOMIZED = (
    "lambda",
    "bias_table",
    "gamma",
    "mid_position",
    "position_embedding",
    "rel_pos",
    "layer_scale_parameter",
)


def _model(name: str, config_name: str, **settings: Any) -> Callable[..., nn.Module]:
    """A function that creates `transformers.<name>(transformers.<config_name>(**settings))`."""

    def make(seed: int = 0, **extra: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = getattr(transformers, config_name)(**{**settings, **extra})
            model = getattr(transformers, name)(config)
            for parameter_name, parameter in model.named_parameters():
                if any(word in parameter_name for word in _RANDOMIZED):
                    nn.init.normal_(parameter, 1.0 if "lambda" in parameter_name else 0.0, 0.3)
        return model.eval()

    return make


def _with_backbone(name: str, config_name: str, backbone: dict[str, Any], **settings: Any) -> Callable[..., nn.Module]:
    """`_model` for a model around a backbone of transformers."""
    return _model(name, config_name, **settings, backbone_config=backbone)


def _headed(family: str) -> Callable[..., nn.Module]:
    """The family's model with the classifier that `with_head` puts on it."""

    def make(seed: int = 0, **extra: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return with_head(SUPPORTED[family](seed, **extra), num_labels=3)

    return make


def _backbone(name: str, **settings: Any) -> Any:
    """Configuration of a backbone whose four blocks a dense head reads."""
    sizes = {k: v for k, v in VIT.items() if k != "intermediate_size"}
    return getattr(transformers, name)(**{**sizes, "mlp_ratio": 2, "out_indices": [1, 2, 3, 4], **settings})


def _mae_encoder(seed: int = 0, **extra: Any) -> nn.Module:
    return _model("ViTMAEModel", "ViTMAEConfig", **VIT, mask_ratio=0.25)(seed, **extra)


SUPPORTED: dict[str, Callable[..., nn.Module]] = {
    "vit": _model("ViTForImageClassification", "ViTConfig", **VIT, num_labels=3),
    "vit_bare": _model("ViTModel", "ViTConfig", **VIT),
    "vit_mim": _model("ViTForMaskedImageModeling", "ViTConfig", **VIT, encoder_stride=8),
    "deit": _model("DeiTForImageClassification", "DeiTConfig", **VIT, num_labels=3),
    "deit_teacher": _model("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT, num_labels=3),
    "deit_mim": _model("DeiTForMaskedImageModeling", "DeiTConfig", **VIT, encoder_stride=8),
    "vit_msn": _model("ViTMSNForImageClassification", "ViTMSNConfig", **VIT, num_labels=3),
    "vit_mae": _mae_encoder,
    "ijepa": _model("IJepaForImageClassification", "IJepaConfig", **VIT, num_labels=3),
    "ast": _model(
        "ASTForAudioClassification",
        "ASTConfig",
        **WIDTH,
        patch_size=8,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=16,
        num_labels=3,
    ),
    "whisper": _model(
        "WhisperForAudioClassification", "WhisperConfig", **WHISPER, classifier_proj_size=16, num_labels=3
    ),
    "whisper_bare": _model("WhisperModel", "WhisperConfig", **WHISPER),
    "whisper_text": _model("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
    "wav2vec2": _model("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **WAVEFORM),
    "wav2vec2_large": _model("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **STABLE),
    "hubert": _model("HubertForSequenceClassification", "HubertConfig", **WAVEFORM),
    "hubert_large": _model("HubertForSequenceClassification", "HubertConfig", **STABLE),
    "data2vec_audio": _model("Data2VecAudioForSequenceClassification", "Data2VecAudioConfig", **WAVEFORM),
    "unispeech_sat": _model("UniSpeechSatForSequenceClassification", "UniSpeechSatConfig", **STABLE),
    "vivit": _model(
        "VivitForVideoClassification",
        "VivitConfig",
        **WIDTH,
        image_size=16,
        num_frames=4,
        tubelet_size=[2, 8, 8],
        num_labels=3,
    ),
    "videomae": _model(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        **WIDTH,
        image_size=16,
        patch_size=8,
        num_frames=4,
        num_labels=3,
    ),
    "dinov2": _model("Dinov2ForImageClassification", "Dinov2Config", **VIT, mlp_ratio=2, num_labels=3),
    "dinov2_swiglu": _model(
        "Dinov2ForImageClassification", "Dinov2Config", **VIT, mlp_ratio=2, use_swiglu_ffn=True, num_labels=3
    ),
    "dinov2_backbone": _model(
        "Dinov2Backbone", "Dinov2Config", **VIT, mlp_ratio=2, out_indices=[2, 4], reshape_hidden_states=True
    ),
    "dinov2_registers": _model(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        **VIT,
        mlp_ratio=2,
        num_register_tokens=3,
        num_labels=3,
    ),
    "dinov3": _model("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, num_register_tokens=2),
    "dinov3_backbone": _model("DINOv3ViTBackbone", "DINOv3ViTConfig", **VIT, num_register_tokens=2, out_indices=[2, 4]),
    "dinov3_gated": _model(
        "DINOv3ViTModel", "DINOv3ViTConfig", **VIT, num_register_tokens=2, use_gated_mlp=True, hidden_act="silu"
    ),
    "dinov3_headed": _headed("dinov3"),
    "beit": _model("BeitForImageClassification", "BeitConfig", **VIT, use_relative_position_bias=True, num_labels=3),
    "beit_shared_bias": _model(
        "BeitForImageClassification", "BeitConfig", **VIT, use_shared_relative_position_bias=True, num_labels=3
    ),
    "beit_no_bias": _model(
        "BeitForImageClassification", "BeitConfig", **VIT, use_absolute_position_embeddings=True, num_labels=3
    ),
    "data2vec": _model(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        **VIT,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        num_labels=3,
    ),
    "data2vec_shared_bias": _model(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        **VIT,
        use_shared_relative_position_bias=True,
        num_labels=3,
    ),
    "clip": _model("CLIPForImageClassification", "CLIPConfig", vision_config=VIT, text_config=TEXT, num_labels=3),
    "clip_bare": _model("CLIPVisionModel", "CLIPVisionConfig", **VIT),
    "clip_projection": _model("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VIT, projection_dim=16),
    "metaclip2": _model(
        "MetaClip2ForImageClassification", "MetaClip2Config", vision_config=VIT, text_config=TEXT, num_labels=3
    ),
    "owlvit": _model("OwlViTVisionModel", "OwlViTVisionConfig", **VIT),
    "owlv2": _model("Owlv2VisionModel", "Owlv2VisionConfig", **VIT),
    "chinese_clip": _model("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", **VIT),
    "siglip": _model("SiglipForImageClassification", "SiglipConfig", vision_config=VIT, text_config=TEXT, num_labels=3),
    "siglip_pooling": _model("SiglipVisionModel", "SiglipVisionConfig", **VIT),
    "siglip2": _model(
        "Siglip2ForImageClassification",
        "Siglip2Config",
        vision_config={**WIDTH, "patch_size": 8, "num_patches": 16},
        text_config=TEXT,
        num_labels=3,
    ),
    "siglip2_pooling": _model("Siglip2VisionModel", "Siglip2VisionConfig", **WIDTH, patch_size=8, num_patches=16),
    "aimv2": _model("Aimv2VisionModel", "Aimv2VisionConfig", **VIT),
    "aimv2_headed": _headed("aimv2"),
    "pixio": _model("PixioModel", "PixioConfig", **VIT, n_cls_tokens=3),
    "internvl": _model("InternVLVisionModel", "InternVLVisionConfig", **WIDTH, image_size=[32, 32], patch_size=[8, 8]),
    "internvl_qk_norm": _model(
        "InternVLVisionModel",
        "InternVLVisionConfig",
        **WIDTH,
        image_size=[32, 32],
        patch_size=[8, 8],
        use_qk_norm=True,
        norm_type="rms_norm",
    ),
    "radio": _model("RadioModel", "RadioConfig", **VIT),
    "radio_headed": _headed("radio"),
    "blip": _model("BlipVisionModel", "BlipVisionConfig", **VIT, initializer_range=0.02),
    "vjepa2": _model(
        "VJEPA2ForVideoClassification",
        "VJEPA2Config",
        **{k: v for k, v in WIDTH.items() if k != "intermediate_size"},
        mlp_ratio=2,
        crop_size=16,
        patch_size=8,
        frames_per_clip=4,
        tubelet_size=2,
        pred_hidden_size=32,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=2,
        num_pooler_layers=2,
        num_labels=3,
    ),
    "mlcd": _model("MLCDVisionModel", "MLCDVisionConfig", **VIT),
    "dpt": _model(
        "DPTForDepthEstimation",
        "DPTConfig",
        **VIT,
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    ),
    "detr_dinov2": _with_backbone(
        "DetrForObjectDetection",
        "DetrConfig",
        {"model_type": "dinov2", **VIT, "mlp_ratio": 2, "out_indices": [4]},
        **DETR,
    ),
    "yolos": _model(
        "YolosForObjectDetection",
        "YolosConfig",
        **WIDTH,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=3,
        num_labels=3,
    ),
    "depth_anything": _model(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        backbone_config=_backbone("Dinov2Config", reshape_hidden_states=False),
        patch_size=8,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    ),
    "upernet": _model(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        backbone_config=_backbone("Dinov2Config"),
        hidden_size=16,
        use_auxiliary_head=False,
        num_labels=3,
    ),
    "vitpose": _model(
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        backbone_config=_backbone("VitPoseBackboneConfig", image_size=[32, 32], patch_size=[8, 8], out_indices=[4]),
        num_labels=3,
    ),
    "conditional_detr": _model(
        "ConditionalDetrForObjectDetection",
        "ConditionalDetrConfig",
        backbone_config=_backbone("Dinov2Config", out_indices=[4]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        num_labels=3,
    ),
    "clip_dual": _model("CLIPModel", "CLIPConfig", vision_config=VIT, text_config=WORDS),
    "siglip_dual": _model("SiglipModel", "SiglipConfig", vision_config=VIT, text_config=WORDS),
    "llava": _model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config={"model_type": "clip_vision_model", **VIT},
        text_config={"model_type": "llama", **WORDS},
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    ),
    "paligemma": _model(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        vision_config={"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
        text_config={"model_type": "gemma", **WORDS, "head_dim": 16},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
    ),
    "smolvlm": _model(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        vision_config=VIT,
        text_config={"model_type": "llama", **WORDS},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    ),
    "internvl_chat": _model(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        vision_config={"model_type": "internvl_vision", **WIDTH, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **WORDS},
        image_token_id=IMAGE_TOKEN,
    ),
}

NO_REDUCTION: dict[str, Callable[..., nn.Module]] = {
    "wavlm": _model("WavLMForSequenceClassification", "WavLMConfig", **WAVEFORM),
    "wavlm_large": _model("WavLMForSequenceClassification", "WavLMConfig", **STABLE),
    "swin": _model(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "swinv2": _model(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "hiera": _model(
        "HieraForImageClassification",
        "HieraConfig",
        image_size=[32, 32],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        embed_dim=16,
        depths=[1, 2],
        num_heads=[1, 2],
        masked_unit_size=[4, 4],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_attention=[True, False],
    ),
    "sam": _model(
        "SamVisionModel",
        "SamVisionConfig",
        **WIDTH,
        image_size=32,
        patch_size=8,
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1, 3],
        mlp_dim=64,
    ),
    "vitdet": _model(
        "VitDetModel",
        "VitDetConfig",
        **{k: v for k, v in WIDTH.items() if k != "intermediate_size"},
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        pretrain_image_size=32,
        window_size=2,
        window_block_indices=[0, 2],
    ),
    "segformer": _model(
        "SegformerForImageClassification",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "eomt": _model(
        "EomtForUniversalSegmentation",
        "EomtConfig",
        **{k: v for k, v in VIT.items() if k != "intermediate_size"},
        mlp_ratio=2,
        num_blocks=2,
        num_queries=4,
        num_upscale_blocks=1,
    ),
    "pvt": _model(
        "PvtForImageClassification",
        "PvtConfig",
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 2],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    "convnext": _model(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        image_size=32,
        num_stages=2,
        hidden_sizes=[16, 32],
        depths=[1, 2],
    ),
    "sam2": _model("Sam2HieraDetModel", "Sam2HieraDetConfig", **SAM2),
    "sam2_vision": _model(
        "Sam2VisionModel",
        "Sam2VisionConfig",
        backbone_config={"model_type": "sam2_hiera_det_model", **SAM2},
        backbone_channel_list=[32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8]],
        fpn_hidden_size=16,
        fpn_top_down_levels=[1],
        num_feature_levels=1,
    ),
    "sam3": _model("Sam3VisionModel", "Sam3VisionConfig", backbone_config=SAM3, fpn_hidden_size=16),
    "timesformer": _model(
        "TimesformerForVideoClassification", "TimesformerConfig", **WIDTH, image_size=16, patch_size=8, num_frames=2
    ),
    "maskformer": _with_backbone(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        SWIN,
        decoder_config={"model_type": "detr", "backbone_config": SWIN, **DETR},
        fpn_feature_size=32,
        mask_feature_size=32,
    ),
    "mask2former": _with_backbone(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        SWIN,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=4,
    ),
    "detr_swin": _with_backbone("DetrForObjectDetection", "DetrConfig", SWIN, **DETR),
    "conditional_detr_swin": _with_backbone("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", SWIN, **DETR),
    "rt_detr_swin": _with_backbone(
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        {**SWIN, "out_features": ["stage3", "stage4"]},
        d_model=32,
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_in_channels=[64, 128],
        encode_proj_layers=[1],
        feat_strides=[8, 16],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_in_channels=[32, 32],
        decoder_n_points=2,
        num_feature_levels=2,
        num_queries=4,
    ),
    "qwen2_5_vl": _model(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 64,
            "patch_size": 8,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1, 3],
            "window_size": 32,
        },
        text_config={**WORDS, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE_TOKEN,
    ),
}
"""Models in which no token can be dropped: their blocks train by `keep_rate=1.0`."""

REFUSED: dict[str, Callable[..., nn.Module]] = {
    "resnet": _model(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
    "hubert_layerdrop": _model("HubertForSequenceClassification", "HubertConfig", **{**WAVEFORM, "layerdrop": 0.1}),
}


_IMAGE_TOKENS = {  # class -> number of words that one image takes
    "CLIPModel": 0,
    "SiglipModel": 0,
    "LlavaForConditionalGeneration": 16,
    "PaliGemmaForConditionalGeneration": 16,
    "SmolVLMForConditionalGeneration": 4,
    "InternVLForConditionalGeneration": 4,
    "Qwen2_5_VLForConditionalGeneration": 16,
}


def run_batch(model: nn.Module, batch_size: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """A batch of random inputs for `model`."""
    generator = torch.Generator().manual_seed(seed)
    kind = type(model).__name__

    def random(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    if kind in _IMAGE_TOKENS:
        words = torch.randint(3, IMAGE_TOKEN, (batch_size, 24), generator=generator)
        words[:, 1 : 1 + _IMAGE_TOKENS[kind]] = IMAGE_TOKEN
        text = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        if kind.startswith("Qwen"):
            grid = {"image_grid_thw": torch.tensor([[1, 8, 8]] * batch_size)}
            grid["mm_token_type_ids"] = (words == IMAGE_TOKEN).int()
            return {**text, **grid, "pixel_values": random(64, 384).flatten(0, 1)}
        if kind.startswith("PaliGemma"):
            text["token_type_ids"] = torch.zeros_like(words)
        return {**text, "pixel_values": random(1, 3, 32, 32) if kind.startswith("SmolVLM") else random(3, 32, 32)}
    if kind.startswith("Siglip2"):
        mask = torch.ones(batch_size, 16, dtype=torch.int64)
        mask[-1, 12:] = 0
        shapes = torch.tensor([[4, 4]] * (batch_size - 1) + [[3, 4]])
        return {"pixel_values": random(16, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if kind.startswith("Whisper"):
        inputs = {"input_features": random(16, 48)}
        is_classifier = kind.endswith("AudioClassification")
        return (
            inputs if is_classifier else {**inputs, "decoder_input_ids": torch.ones(batch_size, 3, dtype=torch.int64)}
        )
    if "SequenceClassification" in kind:  # of waveforms; the last one is shorter
        mask = torch.ones(batch_size, 400, dtype=torch.int64)
        mask[-1, 300:] = 0
        return {"input_values": random(400) * mask, "attention_mask": mask}
    if kind.startswith("AST"):
        return {"input_values": random(24, 16)}
    if kind.startswith("VJEPA2"):
        return {"pixel_values_videos": random(4, 3, 16, 16)}
    if kind.startswith(("Vivit", "VideoMAE")):
        return {"pixel_values": random(4, 3, 16, 16)}
    if kind.startswith("Timesformer"):
        return {"pixel_values": random(2, 3, 16, 16)}
    return {"pixel_values": random(3, 32, 32)}
