"""What no rule can say, by model type: one entry a type, a line or a few each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How one type differs from the rules.

    Attributes:
        config: configuration attributes to set, dotted within sub-configurations.
        model: the model class, by name.
        inputs: inputs by name, or functions that make them.
        without: inputs that are left out.
        start: makes the configuration that is then made small, in place of the class's default.
        reason: why there is no case: it is not run, and this is what the coverage page says.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    start: Callable[[Any], Any] | None = None
    reason: str = ""


def randn(*shape: int) -> Callable[[], Tensor]:
    """Makes normal numbers."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(13))


def ints(high: int, *shape: int) -> Callable[[], Tensor]:
    """Makes whole numbers from 1."""
    return lambda: torch.randint(1, high, shape, generator=torch.Generator().manual_seed(13))


def ones(*shape: int) -> Callable[[], Tensor]:
    """Makes a mask that hides nothing."""
    return lambda: torch.ones(*shape, dtype=torch.long)


def resnet(**options: Any) -> Callable[[Any], Any]:
    """Starts a detection transformer from a backbone of transformers in place of one of timm."""
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return lambda cls: cls(
        backbone_config=transformers.ResNetConfig(**small, out_indices=[4]), use_timm_backbone=False, **options
    )


def resnet3(cls: Any) -> Any:
    """The same with three scales."""
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return cls(backbone_config=transformers.ResNetConfig(**small, out_indices=[2, 3, 4]), use_timm_backbone=False)


def grid_positions() -> Tensor:
    """3 16 2: the places of patches on a 4 × 4 grid."""
    return torch.cartesian_prod(torch.arange(4), torch.arange(4))[None].expand(3, -1, -1)


def patches(width: int) -> Callable[[], Tensor]:
    """3 16 width: row and column from 1, then pixels."""
    return lambda: torch.cat([grid_positions() + 1, randn(3, 16, width - 2)()], -1)


def long_mask(length: int) -> Callable[[], Tensor]:
    """3 length: padded left and right, longer than a block."""

    def make() -> Tensor:
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, : length // 6] = 0
        mask[2, -(length // 5) :] = 0
        return mask

    return make


def first_token(length: int) -> Callable[[], Tensor]:
    """3 length: 1 at the first token that is not padding."""

    def make() -> Tensor:
        mask = torch.zeros(3, length, dtype=torch.long)
        mask[:, 0], mask[1, 0], mask[1, length // 6] = 1, 0, 1
        return mask

    return make


def left_mask() -> Tensor:
    """3 9: padded on the left alone."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = 0
    return mask


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IMAGE = {"pixel_values": randn(3, 3, 64, 64)}
SAM = {
    "image_embeddings": randn(3, 64, 4, 4),
    "image_positional_embeddings": randn(3, 64, 4, 4),
    "sparse_prompt_embeddings": randn(3, 1, 2, 64),
    "dense_prompt_embeddings": randn(3, 64, 4, 4),
    "multimask_output": True,
}
SAM2 = {**SAM, "high_resolution_features": lambda: [randn(3, 8, 16, 16)(), randn(3, 16, 8, 8)()]}
SAM_CONFIG = {"vision_config.output_channels": 64, "prompt_encoder_config.image_size": 32, "prompt_encoder_config.patch_size": 8}
SAM3 = {"vision_features": randn(3, 16, 64), "text_features": randn(3, 5, 64)}
SERIES = {"prediction_length": 8, "num_time_features": 2, "lags_sequence": [1, 2, 3]}
POINTS = {"input_points": None, "input_labels": None, "input_boxes": randn(3, 2, 4), "input_masks": None}
ROPE3 = {**ROPE, "mrope_section": [3, 3, 2]}
HIERA = {"hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4, 4], "num_attention_heads": 1, "blocks_per_stage": [1, 2, 2, 1], "window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [3], "image_size": [64, 64]}
TIMM = "needs timm, which needs torchvision; neither is installed"
NO_PART = "is a part that only other models build, and is run with them"
NO_FORWARD = "has no forward of its own; its parts have rows of theirs"
SESSION = "takes a video session object that only its processor makes"
MASKS = Recipe(inputs={"masks": randn(3, 1, 32, 32)})

RECIPES: dict[str, Recipe] = {
    "align": Recipe(reason="its vision tower is a convolutional net whose widths do not shrink; its text tower has a row"),
    "aria": Recipe(config={"projector_patch_to_query_dict": {16: 8}}),
    "autoformer": Recipe(config=SERIES),
    "bamba": Recipe(config={"num_hidden_layers": 2, "attn_layer_indices": [1]}),
    "bark": Recipe(reason=NO_FORWARD),
    "blip_2_qformer": Recipe(inputs={"query_embeds": randn(3, 6, 64), "encoder_hidden_states": randn(3, 7, 64)}, config={"encoder_hidden_size": 64}),
    "blt_local_decoder": Recipe(inputs={"inputs_embeds": randn(3, 9, 64), "patch_embeds": randn(3, 9, 64)}, without=("input_ids",)),
    "bridgetower_vision_model": Recipe(inputs={"image": randn(3, 3, 32, 32)}),
    "chameleon_vqgan": Recipe(reason=NO_FORWARD),
    "emu3_vqgan": Recipe(reason=NO_FORWARD),
    "glm_image_vqmodel": Recipe(reason=NO_FORWARD),
    "qwen2_5_omni": Recipe(reason=NO_FORWARD),
    "qwen3_omni_moe": Recipe(reason=NO_FORWARD),
    "clap": Recipe(inputs={"input_features": randn(3, 1, 64, 64)}),
    "clap_audio_model": Recipe(inputs={"input_features": randn(3, 1, 64, 64)}),
    "clvp": Recipe(config={"text_config.projection_dim": 128, "speech_config.projection_dim": 128, "projection_dim": 128}, inputs={"input_features": randn(3, 80, 20)}),
    "clvp_encoder": Recipe(config={"projection_dim": 128}),
    "conditional_detr": Recipe(start=resnet()),
    "dab-detr": Recipe(start=resnet()),
    "deformable_detr": Recipe(start=resnet3, config={"num_feature_levels": 3}),
    "detr": Recipe(start=resnet()),
    "table-transformer": Recipe(start=resnet()),
    "dbrx": Recipe(config={"attn_config.kv_n_heads": 2, "attn_config.rope_theta": 10000.0}),
    "decision_transformer": Recipe(
        inputs={"states": randn(3, 5, 17), "actions": randn(3, 5, 4), "rewards": randn(3, 5, 1), "returns_to_go": randn(3, 5, 1),
                "timesteps": lambda: torch.arange(5)[None].expand(3, -1), "attention_mask": ones(3, 5)}
    ),
    "deepseek_ocr2_encoder": Recipe(inputs={"inputs_embeds": randn(3, 16, 64), "num_patches": 16}),
    "deepseek_v2": Recipe(config={"num_experts_per_tok": 2, "topk_method": "greedy"}),
    "deepseek_vl_hybrid": Recipe(inputs={"high_res_pixel_values": randn(3, 3, 32, 32)}),
    "dia": Recipe(inputs={"decoder_input_ids": ints(60, 3, 6, 9)}),
    "dia_decoder": Recipe(inputs={"input_ids": ints(60, 3, 9, 9)}),
    "diffusion_gemma": Recipe(reason="its default configuration leaves out widths"),
    "dots1": Recipe(config={"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "edgetam_mask_decoder": Recipe(inputs=SAM2),
    "edgetam_video_mask_decoder": Recipe(inputs=SAM2),
    "sam2_mask_decoder": Recipe(inputs=SAM2),
    "sam2_video_mask_decoder": Recipe(inputs=SAM2),
    "sam3_tracker_mask_decoder": Recipe(inputs=SAM2),
    "sam3_tracker_video_mask_decoder": Recipe(inputs=SAM2),
    "sam_mask_decoder": Recipe(inputs=SAM),
    "sam_hq_mask_decoder": Recipe(inputs={**SAM, "hq_token_only": False, "intermediate_embeddings": lambda: [randn(3, 4, 4, 64)()]}),
    "edgetam_prompt_encoder": Recipe(inputs=POINTS),
    "edgetam_video_prompt_encoder": Recipe(inputs=POINTS),
    "sam2_prompt_encoder": Recipe(inputs=POINTS),
    "sam2_video_prompt_encoder": Recipe(inputs=POINTS),
    "sam3_tracker_prompt_encoder": Recipe(inputs=POINTS),
    "sam3_tracker_video_prompt_encoder": Recipe(inputs=POINTS),
    "sam_prompt_encoder": MASKS,
    "sam_hq_prompt_encoder": MASKS,
    "edgetam_video": Recipe(reason=SESSION),
    "sam2_video": Recipe(reason=SESSION),
    "sam3_tracker_video": Recipe(reason=SESSION),
    "sam3_video": Recipe(reason=SESSION),
    "sam": Recipe(config=SAM_CONFIG),
    "sam_hq": Recipe(config={**SAM_CONFIG, "mask_decoder_config.vit_dim": 64}),
    "sam3_detr_decoder": Recipe(inputs={**SAM3, "vision_pos_encoding": randn(3, 16, 64), "spatial_shapes": lambda: torch.tensor([[4, 4]])}),
    "sam3_lite_text_detr_decoder": Recipe(inputs={**SAM3, "vision_pos_encoding": randn(3, 16, 64), "spatial_shapes": lambda: torch.tensor([[4, 4]])}),
    "sam3_detr_encoder": Recipe(inputs={**SAM3, "vision_features": lambda: [randn(3, 64, 4, 4)()], "vision_pos_embeds": lambda: [randn(3, 64, 4, 4)()]}),
    "sam3_lite_text_detr_encoder": Recipe(inputs={**SAM3, "vision_features": lambda: [randn(3, 64, 4, 4)()], "vision_pos_embeds": lambda: [randn(3, 64, 4, 4)()]}),
    "sam3_geometry_encoder": Recipe(inputs={"box_embeddings": randn(3, 2, 4), "box_mask": lambda: torch.ones(3, 2, dtype=torch.bool), "box_labels": ones(3, 2), "img_feats": lambda: (randn(3, 64, 4, 4)(),), "img_pos_embeds": lambda: (randn(3, 64, 4, 4)(),)}),
    "sam3_lite_text_geometry_encoder": Recipe(inputs={"box_embeddings": randn(3, 2, 4), "box_mask": lambda: torch.ones(3, 2, dtype=torch.bool), "box_labels": ones(3, 2), "img_feats": lambda: (randn(3, 64, 4, 4)(),), "img_pos_embeds": lambda: (randn(3, 64, 4, 4)(),)}),
    "sam3_mask_decoder": Recipe(inputs={"decoder_queries": randn(3, 6, 64), "backbone_features": lambda: [randn(3, 64, 16, 16)(), randn(3, 64, 8, 8)(), randn(3, 64, 4, 4)()], "encoder_hidden_states": randn(3, 16, 64), "prompt_features": randn(3, 5, 64)}),
    "sam3_lite_text_mask_decoder": Recipe(inputs={"decoder_queries": randn(3, 6, 64), "backbone_features": lambda: [randn(3, 64, 16, 16)(), randn(3, 64, 8, 8)(), randn(3, 64, 4, 4)()], "encoder_hidden_states": randn(3, 16, 64), "prompt_features": randn(3, 5, 64)}),
    "esm": Recipe(config={"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"}),
    "esmc": Recipe(),
    "fastspeech2_conformer_hifigan": Recipe(inputs={"spectrogram": randn(3, 20, 80)}),
    "speecht5_hifigan": Recipe(inputs={"spectrogram": randn(3, 20, 80)}),
    "fastspeech2_conformer_with_hifigan": Recipe(config={"vocoder_config.model_in_dim": 80}),
    "gemma3n_audio": Recipe(inputs={"audio_mel": randn(3, 64, 128), "audio_mel_mask": lambda: torch.zeros(3, 64, dtype=torch.bool)}),
    "gemma4_unified_audio": Recipe(reason=NO_PART),
    "gemma4_unified_vision": Recipe(reason=NO_PART),
    "idefics_perciever": Recipe(reason=NO_PART),
    "idefics_vision": Recipe(reason=NO_PART),
    "pp_chart2table_vision": Recipe(reason=NO_PART),
    "t5_gemma_module": Recipe(reason=NO_PART),
    "sapiens2_head": Recipe(reason=NO_PART),
    "vibevoice_diffusion": Recipe(reason=NO_PART),
    "gpt_neo": Recipe(config={"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "granite_speech5_ctc": Recipe(inputs={"input_features": randn(3, 60, 160)}),
    "hunyuan_v1_dense": Recipe(config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "alpha": 1000.0}}),
    "hunyuan_v1_moe": Recipe(config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "alpha": 1000.0}}),
    "idefics2_perceiver": Recipe(inputs={"context": randn(3, 9, 64), "attention_mask": ones(3, 9)}),
    "informer": Recipe(config=SERIES),
    "time_series_transformer": Recipe(config=SERIES),
    "inkling_audio": Recipe(inputs={"audio_input_ids": ints(10, 3, 9, 8)}),
    "instructblip": Recipe(inputs={"qformer_input_ids": ints(60, 3, 6), "qformer_attention_mask": ones(3, 6)}),
    "instructblipvideo": Recipe(inputs={"qformer_input_ids": ints(60, 3, 6), "qformer_attention_mask": ones(3, 6)}),
    "jamba": Recipe(config={"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_hidden_layers": 4, "mamba_dt_rank": 8}),
    "jev": Recipe(inputs={"marks": ones(3, 9), "num_options": ints(3, 3), "question_type_ids": ints(2, 3)}),
    "kosmos-2": Recipe(inputs={"image_embeds_position_mask": lambda: torch.tensor([[0] * 2 + [1] * 6 + [0]] * 3)}),
    "lilt": Recipe(config={"hidden_size": 96}),
    "layoutlmv3": Recipe(config={"coordinate_size": 10, "shape_size": 12, "input_size": 32}),
    "layoutxlm": Recipe(reason="shares LayoutLMv2's model, which needs detectron2"),
    "lw_detr": Recipe(config={"backbone_config.num_windows": 4, "backbone_config.image_size": 32}),
    "lw_detr_vit": Recipe(config={"num_windows": 4}),
    "lxmert": Recipe(inputs={"visual_feats": randn(3, 5, 2048), "visual_pos": randn(3, 5, 4)}),
    "lightglue": Recipe(inputs={"pixel_values": randn(3, 2, 1, 64, 64)}),
    "superglue": Recipe(inputs={"pixel_values": randn(3, 2, 3, 64, 64)}),
    "mamba2": Recipe(config={"num_heads": 8}),
    "mllama_vision_model": Recipe(inputs={"pixel_values": randn(3, 1, 4, 3, 32, 32), "aspect_ratio_ids": ones(3, 1), "aspect_ratio_mask": ones(3, 1, 4)}),
    "mllama": Recipe(inputs={"pixel_values": randn(3, 1, 4, 3, 32, 32), "aspect_ratio_ids": ones(3, 1), "aspect_ratio_mask": ones(3, 1, 4), "cross_attention_mask": ones(3, 9, 1, 4)}),
    "moonshine_streaming": Recipe(reason="its default configuration leaves out what its decoder reads"),
    "musicgen_decoder": Recipe(inputs={"input_ids": ints(60, 12, 9)}, without=("attention_mask",)),
    "musicgen_melody_decoder": Recipe(inputs={"input_ids": ints(60, 12, 9)}, without=("attention_mask",)),
    "nemotron": Recipe(),
    "nougat": Recipe(reason="its default configuration names a model type that transformers does not map"),
    "oneformer": Recipe(inputs={"task_inputs": ints(60, 3, 7)}),
    "patchtst": Recipe(inputs={"past_values": randn(3, 32, 1)}),
    "patchtsmixer": Recipe(inputs={"past_values": randn(3, 32, 1)}),
    "timesfm": Recipe(inputs={"past_values": randn(3, 64), "past_values_padding": lambda: torch.zeros(3, 64, dtype=torch.long), "freq": lambda: torch.zeros(3, 1, dtype=torch.long)}),
    "perceiver": Recipe(config={"d_model": 64}, inputs={"inputs": randn(3, 9, 64), "attention_mask": ones(3, 9)}),
    "phi4_multimodal_audio": Recipe(inputs={"hidden_states": randn(3, 64, 80), "mask": lambda: None}),
    "pi0": Recipe(inputs={"action_embeds": randn(3, 5, 64)}),
    "pix2struct": Recipe(inputs={"flattened_patches": randn(3, 16, 770), "attention_mask": ones(3, 16)}, config={"vision_config.patch_embed_hidden_size": 768, "vision_config.patch_size": 16}),
    "pix2struct_vision_model": Recipe(inputs={"flattened_patches": randn(3, 16, 770), "attention_mask": ones(3, 16)}, config={"patch_embed_hidden_size": 768, "patch_size": 16}),
    "pop2piano": Recipe(without=("input_features",)),
    "qwen2_5_omni_audio_encoder": Recipe(inputs={"input_features": randn(128, 60), "feature_lens": lambda: torch.tensor([40, 20])}, without=("attention_mask",)),
    "qwen3_omni_moe_audio_encoder": Recipe(inputs={"input_features": randn(128, 60), "feature_lens": lambda: torch.tensor([40, 20])}),
    "qwen2_5_omni_bigvgan": Recipe(inputs={"mel_spectrogram": randn(3, 80, 20)}),
    "qwen2_5_omni_dit": Recipe(inputs={"hidden_states": randn(2, 24, 80), "condition_vector": randn(2, 24, 80), "speaker_embedding": randn(2, 24, 192), "quantized_code": ints(50, 2, 12), "time_step": lambda: torch.tensor(0.5), "apply_cfg": False}),
    "qwen2_5_omni_token2wav": Recipe(reason=NO_FORWARD),
    "qwen3_omni_moe_talker_code_predictor": Recipe(inputs={"inputs_embeds": randn(3, 9, 64)}, without=("input_ids",)),
    "qwen4_exp": Recipe(reason="its default configuration leaves out sizes that its n-gram embedding divides by"),
    "rag": Recipe(reason="needs a retriever with an index"),
    "recurrent_gemma": Recipe(config={"num_hidden_layers": 3}),
    "reformer": Recipe(config={"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh", "local", "lsh"], "num_hidden_layers": 4, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_hashes": 2, "num_buckets": 4}),
    "seggpt": Recipe(config={"merge_index": 0, "intermediate_hidden_state_indices": [1], "image_size": [64, 32]}),
    "speech-encoder-decoder": Recipe(without=("input_features",)),
    "speecht5": Recipe(inputs={"input_values": randn(3, 9, 64), "decoder_input_values": randn(3, 6, 64)}, model="SpeechT5Model"),
    "step3p5": Recipe(config={"sliding_window": 4}),
    "swin2sr": Recipe(config={"num_heads": [2, 2, 2, 2], "embed_dim": 32, "depths": [2, 2], "window_size": 4, "image_size": 16}),
    "t5gemma2_decoder": Recipe(config={"dropout_rate": 0.0}),
    "t5gemma2_encoder": Recipe(config={"text_config.dropout_rate": 0.0, "dropout_rate": 0.0}),
    "t5gemma2_text": Recipe(config={"dropout_rate": 0.0}),
    "tapas": Recipe(inputs={"token_type_ids": lambda: torch.zeros(3, 9, 7, dtype=torch.long)}),
    "tvp": Recipe(reason="its visual prompt and convolutional backbone only fit full-size frames"),
    "unlimited_ocr_vision_encoder": Recipe(inputs={"pixel_values": randn(3, 3, 32, 32), "patch_embeds": randn(3, 16, 64)}),
    "videomt": Recipe(inputs={"pixel_values_videos": randn(2, 2, 3, 32, 32)}),
    "videoprism_vision_model": Recipe(inputs={"pixel_values_videos": randn(3, 4, 3, 32, 32)}, without=("pixel_values",)),
    "voxtral_realtime_text": Recipe(reason="transformers maps it to a class that it does not have"),
    "xlstm": Recipe(reason="no attention: a recurrent matrix memory; its state's shapes do not shrink by rule"),
    "xmod": Recipe(config={"default_language": "en_XX"}),
    "zamba": Recipe(config={"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}),
    "mimi_decoder": Recipe(inputs={"latents": randn(3, 64, 9)}),
    "pocket_tts_audio_tokenizer_decoder": Recipe(inputs={"latents": randn(3, 64, 9)}),
    "layoutlmv2": Recipe(),
    "video_llama_3": Recipe(inputs={"image_merge_sizes": lambda: torch.tensor([2, 2, 2])}),
    "video_llama_3_vision": Recipe(inputs={"merge_sizes": lambda: torch.tensor([2, 2, 2])}),
    "vibevoice": Recipe(reason="its tokenizers are convolutional nets whose widths do not shrink; its text model is Qwen2"),
    "minicpm_ocr_vision": Recipe(inputs={"target_sizes": lambda: torch.tensor([[4, 4]] * 3)}),
    "minicpmv4_6_vision": Recipe(inputs={"target_sizes": lambda: torch.tensor([[4, 4]] * 3)}),
    "minicpmv4_7_vision": Recipe(inputs={"target_sizes": lambda: torch.tensor([[4, 4]] * 3)}),
    "superpoint": Recipe(inputs=IMAGE),
    "cohere_compass_text": Recipe(config={"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}),
    "ministral": Recipe(config={"rope_parameters": ROPE}),
}
RECIPES |= {
    "blt": Recipe(reason="transformers cannot build a cache for it: its configuration has no num_hidden_layers"),
    "blt_local_encoder": Recipe(inputs={"patch_embeds": randn(3, 9, 64), "num_patches": 9, "patch_ids": lambda: torch.arange(9)[None].expand(3, -1)}, without=("encoder_attention_mask", "attention_mask")),
    "chameleon": Recipe(config={"vocabulary_map": {"<image>": 120, "IMGIMGA": 3}}, without=("pixel_values",)),
    "emu3": Recipe(config={"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}}, without=("pixel_values",)),
    "cohere_compass": Recipe(config={"text_config.rope_parameters": {"full_attention": ROPE3, "sliding_attention": ROPE3}}),
    "cohere_compass_text": Recipe(config={"rope_parameters": {"full_attention": ROPE3, "sliding_attention": ROPE3}}),
    "dbrx": Recipe(config={"attn_config.kv_n_heads": 2, "attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}),
    "dots1": Recipe(config={"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "deepseek_ocr2_text": Recipe(config={"mlp_layer_types": ["dense", "sparse"]}),
    "unlimited_ocr_text": Recipe(config={"mlp_layer_types": ["dense", "sparse"]}),
    "lfm2_moe": Recipe(config={"layer_types": ["conv", "full_attention"]}),
    "ernie4_5_vl_moe_text": Recipe(config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}),
    "esmfold2": Recipe(reason="its three-dimensional rotary embedding needs heads of full width, and its trunk all of its sizes"),
    "evolla": Recipe(inputs={"protein_input_ids": ints(20, 3, 11), "protein_attention_mask": ones(3, 11)}),
    "fast_vlm": Recipe(reason=TIMM),
    "gemma3n": Recipe(reason=TIMM),
    "gemma3n_vision": Recipe(reason=TIMM),
    "edgetam": Recipe(reason=TIMM),
    "edgetam_vision_model": Recipe(reason=TIMM),
    "pe_audio_video": Recipe(reason=TIMM),
    "pe_audio_video_encoder": Recipe(reason=TIMM),
    "pe_video": Recipe(reason=TIMM),
    "pe_video_encoder": Recipe(reason=TIMM),
    "perception_lm": Recipe(reason=TIMM),
    "timm_backbone": Recipe(reason=TIMM),
    "timm_wrapper": Recipe(reason=TIMM),
    "omdet-turbo": Recipe(reason=TIMM),
    "gemma3n_text": Recipe(config={"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": [48, 48, 48, 48]}),
    "gemma4_vision": Recipe(inputs={"pixel_position_ids": grid_positions}),
    "granite_docling": Recipe(inputs={"pixel_values": randn(3, 1, 3, 32, 32), "pixel_attention_mask": ones(3, 1, 32, 32)}),
    "granite_speech5_ctc": Recipe(inputs={"input_features": randn(3, 60, 320)}),
    "granite_speech5_encoder": Recipe(inputs={"input_features": randn(3, 60, 320)}),
    "inkling2_vision": Recipe(inputs={"pixel_values": randn(12, 2, 16, 16, 3)}),
    "inkling_audio": Recipe(inputs={"audio_input_ids": ints(10, 3, 9, 80)}),
    "inkling_vision": Recipe(reason="its patch embedding does not shrink: building it takes half a minute"),
    "inkling_mm_model": Recipe(reason="its patch embedding does not shrink: building it takes half a minute; its text model has a row"),
    "instructblipvideo": Recipe(inputs={"pixel_values": randn(3, 4, 3, 32, 32), "qformer_input_ids": ints(60, 3, 6), "qformer_attention_mask": ones(3, 6)}),
    "jev": Recipe(inputs={"marks": ones(3, 9), "num_options": lambda: torch.tensor([2, 2, 2]), "question_type_ids": lambda: torch.zeros(3, dtype=torch.long)}),
    "janus_vqgan": Recipe(reason="a convolutional codec whose image size its decoder fixes"),
    "kyutai_speech_to_text": Recipe(inputs={"input_ids": ints(60, 3, 9, 33)}),
    "lw_detr": Recipe(config={"backbone_config.num_windows": 4, "backbone_config.image_size": 32, "group_detr": 2}),
    "lxmert": Recipe(config={"visual_feat_dim": 64}, inputs={"visual_feats": randn(3, 5, 64), "visual_pos": randn(3, 5, 4)}),
    "mistral4": Recipe(config={"qk_head_dim": 24, "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.3334}}),
    "moonshine_streaming": Recipe(config={"num_key_value_heads": 4, "encoder_config.num_key_value_heads": 4}),
    "mllama": Recipe(inputs={"pixel_values": randn(3, 1, 4, 3, 32, 32), "aspect_ratio_ids": ones(3, 1), "aspect_ratio_mask": ones(3, 1, 4), "cross_attention_mask": ones(3, 9, 1, 4)}, config={"vision_config.vision_output_dim": 128}),
    "nemotron_h": Recipe(config={"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}),
    "neomme": Recipe(without=("pixel_values",)),
    "oneformer": Recipe(inputs={"task_inputs": ints(60, 3, 77), "pixel_values": randn(3, 3, 128, 128)}, without=("pixel_mask",)),
    "minicpm_ocr_vision": Recipe(inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}),
    "minicpmv4_6_vision": Recipe(inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}),
    "minicpmv4_7_vision": Recipe(inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}),
    "pi0": Recipe(inputs={"action_embeds": randn(3, 5, 64), "pixel_values": randn(3, 1, 3, 32, 32), "pixel_attention_mask": lambda: torch.ones(3, 1, dtype=torch.bool)}),
    "pix2struct": Recipe(inputs={"flattened_patches": patches(770), "attention_mask": ones(3, 16)}, config={"vision_config.patch_embed_hidden_size": 768}),
    "pix2struct_vision_model": Recipe(inputs={"flattened_patches": patches(770), "attention_mask": ones(3, 16)}, config={"patch_embed_hidden_size": 768}),
    "pix2struct_text_model": Recipe(config={"initializer_range": 0.02}),
    "musicgen": Recipe(config={"dropout": 0.0}),
    "musicgen_melody": Recipe(config={"dropout": 0.0}),
    "qwen2_5_omni_bigvgan": Recipe(inputs={"mel_spectrogram": randn(3, 64, 20)}, config={"upsample_initial_channel": 64}),
    "qwen2_5_omni_dit": Recipe(config={"mel_dim": 80}, inputs={"hidden_states": randn(2, 24, 80), "condition_vector": randn(2, 24, 80), "speaker_embedding": randn(2, 24, 192), "quantized_code": ints(50, 2, 12), "time_step": lambda: torch.tensor(0.5), "apply_cfg": False}),
    "qwen3_omni_moe_audio_encoder": Recipe(inputs={"input_features": randn(128, 64), "feature_lens": lambda: torch.tensor([32, 32])}),
    "qwen3_omni_moe_talker_text": Recipe(config={"shared_expert_intermediate_size": 48}),
    "qwen3_asr_encoder": Recipe(inputs={"input_features": randn(3, 128, 64), "input_features_mask": ones(3, 64)}),
    "sam": Recipe(config=SAM_CONFIG, inputs={"input_points": randn(3, 1, 2, 2)}),
    "sapiens2": Recipe(config={"num_key_value_heads_per_layer": [4, 2], "num_first_full_attention_layers": 1, "num_last_full_attention_layers": 1}),
    "seggpt": Recipe(config={"merge_index": 0, "intermediate_hidden_state_indices": [1], "image_size": [64, 32]}, inputs={"pixel_values": randn(3, 3, 32, 32), "prompt_pixel_values": randn(3, 3, 32, 32), "prompt_masks": randn(3, 3, 32, 32)}),
    "step3p7": Recipe(config={"text_config.sliding_window": 4}),
    "superpoint": Recipe(config={"keypoint_decoder_dim": 65}, inputs=IMAGE),
    "superglue": Recipe(config={"keypoint_detector_config.keypoint_decoder_dim": 65}, inputs={"pixel_values": randn(3, 2, 3, 64, 64)}),
    "lightglue": Recipe(config={"keypoint_detector_config.keypoint_decoder_dim": 65}, inputs={"pixel_values": randn(3, 2, 1, 64, 64)}),
    "sam3_geometry_encoder": Recipe(reason="samples regions with torchvision"),
    "sam3_lite_text_geometry_encoder": Recipe(reason="samples regions with torchvision"),
    "t5gemma2_decoder": Recipe(config={"dropout_rate": 0.0}, inputs={"encoder_hidden_states": randn(3, 7, 64), "encoder_attention_mask": ones(3, 7)}),
    "unlimited_ocr_vision_encoder": Recipe(inputs={"pixel_values": randn(3, 3, 32, 32), "patch_embeds": randn(3, 64, 4, 4)}),
    "vipllava": Recipe(config={"vision_feature_layers": [-2, -1]}),
    "vitmatte": Recipe(inputs={"pixel_values": randn(3, 4, 64, 64)}, config={"fusion_hidden_sizes": [64, 32, 16, 16]}),
    "xcodec": Recipe(inputs={"input_values": randn(3, 1, 4000)}),
    "zamba": Recipe(config={"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_hidden_size": 128, "attention_head_dim": 32}),
    "zoedepth": Recipe(config={"bottleneck_features": 64, "fusion_hidden_size": 64}),
    "molmo2": Recipe(config={"adapter_config.vision_feature_layer": [-1, -2]}),
    "qwen2_audio": Recipe(inputs={"attention_mask": left_mask}),
    "efficientloftr": Recipe(reason="its widths follow a fixed convolutional backbone"),
    "efficientnet": Recipe(reason="a convolutional net whose widths do not shrink; no attention"),
    "gemma4_assistant": Recipe(reason="its default configuration does not pass its own validation"),
    "gemma4_unified_assistant": Recipe(reason="takes the cache of another model"),
    "muse_spark": Recipe(reason="its audio tower's stages do not shrink by rule; its text model has a row"),
    "moshi_depth": Recipe(inputs={"input_ids": ints(60, 3, 3), "last_hidden_state": randn(3, 1, 64)}, without=("attention_mask",)),
    "big_bird": Recipe(config={"block_size": 4, "num_random_blocks": 1}, inputs={"input_ids": ints(60, 3, 48), "attention_mask": long_mask(48), "token_type_ids": lambda: torch.zeros(3, 48, dtype=torch.long)}),
    "bigbird_pegasus": Recipe(config={"block_size": 4, "num_random_blocks": 1}, inputs={"input_ids": ints(60, 3, 48), "attention_mask": long_mask(48)}),
    "longt5": Recipe(config={"encoder_attention_type": "transient-global"}),
    "longformer": Recipe(inputs={"input_ids": ints(60, 3, 16), "attention_mask": long_mask(16), "global_attention_mask": first_token(16)}),
    "led": Recipe(inputs={"input_ids": ints(60, 3, 16), "attention_mask": long_mask(16), "global_attention_mask": first_token(16)}),
    "pegasus_x": Recipe(config={"block_size": 8, "num_global_tokens": 4}),
    "ernie4_5_vl_moe": Recipe(config={"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}),
    "musicgen": Recipe(reason="its default configuration leaves out what its model reads; its decoder has a row"),
    "musicgen_melody": Recipe(reason="its default configuration leaves out what its model reads; its decoder has a row"),
    "deepseek_ocr2_text": Recipe(config={"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}),
    "hunyuan_vl_text": Recipe(config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [2, 2, 2, 2]}}),
    "clap": Recipe(config={"projection_dim": 64, "audio_config.depths": [2, 2], "audio_config.num_attention_heads": [2, 4], "audio_config.patch_embeds_hidden_size": 32, "audio_config.hidden_size": 64}, inputs={"input_features": randn(3, 1, 64, 64)}),
    "clvp": Recipe(config={"text_config.projection_dim": 256, "speech_config.projection_dim": 256, "text_config.hidden_size": 128, "speech_config.hidden_size": 128}, inputs={"input_features": randn(3, 80, 20)}),
    "clvp_encoder": Recipe(config={"projection_dim": 256, "hidden_size": 128}),
    "llama4_vision_model": Recipe(config={"pixel_shuffle_ratio": 0.5, "projector_input_dim": 64, "intermediate_size": 256}),
    "levit": Recipe(config={"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "image_size": 64}),
    "fastspeech2_conformer_hifigan": Recipe(inputs={"spectrogram": randn(3, 20, 64)}),
    "speecht5_hifigan": Recipe(inputs={"spectrogram": randn(3, 20, 64)}),
    "instructblipvideo": Recipe(config={"video_token_index": 110, "image_token_index": 110}, inputs={"pixel_values": randn(3, 4, 3, 32, 32), "qformer_input_ids": ints(60, 3, 6), "qformer_attention_mask": ones(3, 6)}),
    "granitemoehybrid": Recipe(config={"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}),
    "bamba": Recipe(config={"num_hidden_layers": 2, "attn_layer_indices": [1]}),
    "nemotron_h_omni": Recipe(without=("input_features",)),
    "sam2_hiera_det_model": Recipe(config=HIERA),
    "sam2_vision_model": Recipe(config={f"backbone_config.{k}": v for k, v in HIERA.items()} | {"backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}, inputs={"pixel_values": randn(3, 3, 64, 64)}),
    "rf_detr": Recipe(inputs={"pixel_values": randn(3, 3, 64, 64)}),
    "dinat": Recipe(reason="needs natten, a compiled extension"),
    "layoutlmv2": Recipe(reason="needs detectron2"),
    "higgs_audio_v2_tokenizer": Recipe(reason="needs torchaudio"),
    "diffusion_gemma_text": Recipe(reason="its default configuration leaves out widths"),
    "qwen4_exp_text": Recipe(reason="its default configuration leaves out sizes that its indexer divides by"),
}
