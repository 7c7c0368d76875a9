"""Recipes of models that see, hear or do both, where no rule makes what they take."""

from __future__ import annotations

import torch
import transformers

from .recipes import HIERA, ROPE, ROPE4, VQ, Recipe, holders, ints, long_mask, ones, randn, resnet, session

EIGHT = [2, 2, 2, 2]
LINE = Recipe(inputs={"pixel_values": randn(3, 3, 96, 160)})
CODEC = Recipe(
    config={"quantization_dim": 128},
    inputs={"input_values": randn(3, 1, 3200), "input_features": randn(3, 10, 64), "input_features_mask": ones(3, 10)},
)
SPEECH = Recipe(
    config={"window_size": 15},
    inputs={
        "input_features": randn(3, 64, 64),
        "input_features_mask": lambda: torch.ones(3, 15, dtype=torch.bool),
    },
)
WAVES = Recipe(inputs={"input_values": randn(3, 1, 4000), "padding_mask": long_mask(4000)})

SAM2_SIZES = {
    **{f"vision_config.backbone_config.{k}": v for k, v in HIERA.items()},
    "vision_config.backbone_channel_list": [64, 32, 16, 8],
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "prompt_encoder_config.image_size": 64,
    "prompt_encoder_config.patch_size": 16,
}
SAM3_SIZES = {
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "prompt_encoder_config.image_size": 32,
    "prompt_encoder_config.patch_size": 8,
}

RECIPES: dict[str, Recipe] = {
    "align": Recipe(config={"vision_config.width_coefficient": 0.2, "vision_config.depth_coefficient": 0.2}),
    "apertus1p5": Recipe(
        config={
            **{f"vision_config.{name}": value for name, value in VQ.items()},
            "audio_config.codebook_size": 16,
            "image_token_offset": 40,
            "audio_token_offset": 56,
            "image_token_id": 110,
        },
        inputs={
            "pixel_values": randn(3, 3, 8, 8),
            "image_sizes": lambda: torch.tensor([[8, 8]] * 3),
            "input_ids": holders(110, 16),
        },
        without=("input_values", "padding_mask"),
    ),
    "csm": Recipe(without=("input_values",)),
    "deepseek_ocr2": Recipe(
        config={
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "vision_config.sam_config.downsample_channels": [64, 64],
        }
    ),
    "deepseek_ocr2_vision": Recipe(config={"sam_config.downsample_channels": [64, 64]}),
    "depth_pro": Recipe(
        config={
            "patch_size": 32,
            "image_model_config.image_size": 32,
            "patch_model_config.image_size": 32,
            "fov_model_config.image_size": 32,
            "merge_padding_value": 1,
            "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [64, 64],
            "scaled_images_feature_dims": [64, 64, 64],
        },
        inputs={"pixel_values": randn(3, 3, 128, 128)},
    ),
    "dots3_note": Recipe(
        inputs={"input_features": randn(3, 128, 64), "chunk_sample_lengths": lambda: torch.tensor([10240] * 3)}
    ),
    "dots3_note_audio_encoder": Recipe(
        inputs={"input_features": randn(3, 128, 64), "chunk_sample_lengths": lambda: torch.tensor([10240, 8000, 6000])}
    ),
    "efficientnet": Recipe(config={"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256}),
    "efficientloftr": Recipe(
        config={"out_features": [16, 16, 32, 64], "rope_parameters": {**ROPE, "partial_rotary_factor": 2.0}},
        inputs={"pixel_values": randn(3, 2, 3, 64, 64)},
    ),
    "florence_vision": Recipe(inputs={"hidden_states": randn(3, 3, 64, 64)}),
    "fun_asr_nano": Recipe(
        config={"adaptor_config.intermediate_size": 16, "audio_token_id": 110},
        inputs={"input_features": randn(3, 20, 560), "input_features_mask": ones(3, 20)},
    ),
    "fun_asr_nano_encoder": Recipe(inputs={"input_features": randn(3, 20, 560), "input_features_mask": ones(3, 20)}),
    "glm_image": Recipe(
        config={"image_token_id": 110, "vq_config.latent_channels": 64, "vq_config.num_embeddings": 64},
        inputs={
            "image_grid_thw": lambda: torch.tensor([(1, 8, 4)] * 6),
            "images_per_sample": lambda: torch.tensor([2, 2, 2]),
            "pixel_values": randn(96, 192),
            "input_ids": holders(110, 32),
        },
    ),
    "glmasr": Recipe(
        config={"audio_config.intermediate_size": 256},
        inputs={"input_features": randn(3, 128, 64), "input_features_mask": ones(3, 64)},
    ),
    "granite4_vision": Recipe(
        config={
            "deepstack_layer_map": [[-2, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "2/4",
            "image_token_index": 110,
        },
        inputs={"pixel_values": randn(3, 2, 3, 32, 32), "input_ids": holders(110, 10)},
    ),
    "granite_speech": SPEECH,
    "granite_speech_plus": SPEECH,
    "hunyuan_vl": Recipe(
        config={"text_config.rope_parameters": {**ROPE, "xdrope_section": EIGHT, "mrope_section": EIGHT}}
    ),
    "hy_v4_vl": Recipe(config={"text_config.rope_parameters": ROPE4}),
    "inkling2": Recipe(inputs={"pixel_values": randn(96, 16, 16, 3)}),
    "inkling2_loop": Recipe(inputs={"pixel_values": randn(96, 16, 16, 3)}),
    "inkling2_vision": Recipe(inputs={"pixel_values": randn(96, 16, 16, 3)}),
    "inkling_mm_model": Recipe(
        config={"vision_config.patch_size": 4, "vision_config.num_hidden_layers": 3, "image_token_id": 110},
        inputs={"pixel_values": randn(12, 2, 4, 4, 3), "input_ids": holders(110, 4)},
        without=("audio_input_ids",),
    ),
    "inkling_vision": Recipe(
        config={"patch_size": 4, "num_hidden_layers": 3}, inputs={"pixel_values": randn(12, 2, 4, 4, 3)}
    ),
    "jev": Recipe(
        inputs={
            "input_ids": ints(60, 1, 9),
            "marks": lambda: torch.tensor([[3, 5]]),
            "num_options": lambda: torch.tensor([[2, 2]]),
            "question_type_ids": lambda: torch.tensor([[0, 1]]),
        }
    ),
    "janus_vqgan": Recipe(config={"num_patches": 2}),
    "lw_detr": Recipe(
        config={
            "backbone_config.num_windows": 4,
            "backbone_config.image_size": 32,
            "backbone_config.out_indices": [1, 2],
            "group_detr": 2,
            "projector_scale_factors": [1.0],
        }
    ),
    "minicpm_ocr": Recipe(
        inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}
    ),
    "minicpmv4_6": Recipe(
        inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}
    ),
    "minicpmv4_7": Recipe(
        inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}
    ),
    "mistral4": Recipe(
        config={
            "qk_head_dim": 24,
            "head_dim": 8,
            "rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4},
        }
    ),
    "molmo2": Recipe(
        config={"adapter_config.vision_feature_layer": [-1, -2], "image_patch_id": 110},
        inputs={
            "pixel_values": randn(3, 16, 192),
            "image_token_pooling": lambda: torch.arange(48).reshape(12, 4),
            "image_grids": lambda: torch.tensor([[0, 0, 2, 2]] * 3),
            "image_num_crops": ones(3),
            "input_ids": holders(110, 4),
        },
    ),
    "molmo2_adapter": Recipe(
        inputs={
            "image_features": randn(2, 16, 128),
            "pooled_patches_idx": lambda: torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [16, 17, 20, -1]]),
        }
    ),
    "muse_glimmer": Recipe(config={"out_hidden_size": 256}),
    "muse_glimmer_assistant": Recipe(
        inputs={
            "noise_embeds": randn(3, 4, 64),
            "context_hidden_states": randn(3, 5, 320),
            "attention_mask": long_mask(9),
        }
    ),
    "muse_spark": Recipe(
        config={"out_hidden_size": 256, "audio_config.num_hidden_layers": 4}, without=("input_values",)
    ),
    "muse_spark_audio": Recipe(
        config={"num_hidden_layers": 4}, inputs={"input_values": randn(3, 3840)}, without=("padding_mask",)
    ),
    "musicgen": Recipe(
        model="MusicgenForConditionalGeneration",
        inputs={"decoder_input_ids": ints(60, 12, 6)},
        without=("decoder_attention_mask", "input_values"),
    ),
    "musicgen_melody": Recipe(
        model="MusicgenMelodyForConditionalGeneration",
        inputs={"decoder_input_ids": ints(60, 12, 6), "input_features": randn(3, 20, 12)},
        without=("decoder_attention_mask", "input_values"),
    ),
    "musicflamingo": Recipe(
        config={"audio_token_id": 110, "audio_config.max_source_positions": 32},
        inputs={
            "input_features": randn(3, 128, 64),
            "input_features_mask": ones(3, 64),
            "input_ids": holders(110, 16),
        },
    ),
    "neucodec": CODEC,
    "omniasr": Recipe(inputs={"input_values": randn(3, 1, 4000)}, without=("padding_mask",)),
    "omniasr_audio": WAVES,
    "omniasr_ctc": WAVES,
    "pe_audio": Recipe(inputs={"input_values": randn(3, 1, 5760), "padding_mask": ones(3, 5760)}),
    "pe_audio_encoder": Recipe(inputs={"input_values": randn(3, 1, 5760), "padding_mask": ones(3, 5760)}),
    "pi0": Recipe(
        config={"vlm_config.image_token_id": 110},
        inputs={
            "action_embeds": randn(3, 5, 64),
            "pixel_values": randn(3, 1, 3, 32, 32),
            "pixel_attention_mask": lambda: torch.ones(3, 1, dtype=torch.bool),
            "input_ids": holders(110, 16),
        },
    ),
    "pp_doclayout_v2": Recipe(
        config={"class_thresholds": [0.0] * 64, "class_order": list(range(64))},
        inputs={"pixel_values": randn(3, 3, 64, 64)},
    ),
    "pp_doclayout_v3": Recipe(config={"x4_feat_dim": 128}, inputs={"pixel_values": randn(3, 3, 128, 128)}),
    "pp_ocrv5_mobile_rec": LINE,
    "pp_ocrv5_server_rec": LINE,
    "pp_ocrv6_small_rec": LINE,
    "pp_ocrv6_tiny_rec": LINE,
    "qwen2_audio": Recipe(
        config={"audio_config.max_source_positions": 16, "audio_token_index": 110},
        inputs={
            "input_features": randn(3, 128, 32),
            "feature_attention_mask": ones(3, 32),
            "input_ids": holders(110, 8),
        },
    ),
    "qwen3_asr": Recipe(
        config={"audio_config.n_window": 50, "audio_config.n_window_infer": 100, "audio_token_id": 110},
        inputs={
            "input_features": randn(3, 128, 200),
            "input_features_mask": ones(3, 200),
            "input_ids": holders(110, 26),
        },
    ),
    "qwen3_asr_encoder": Recipe(
        config={"n_window": 50, "n_window_infer": 100},
        inputs={"input_features": randn(3, 128, 200), "input_features_mask": ones(3, 200)},
    ),
    "qwen3_omni_moe_audio_encoder": Recipe(
        config={"n_window": 50, "n_window_infer": 100},
        inputs={"input_features": randn(128, 200), "feature_lens": lambda: torch.tensor([130, 70])},
    ),
    "qwen3_omni_moe_talker_text": Recipe(
        config={"shared_expert_intermediate_size": 48},
        inputs={"inputs_embeds": randn(3, 9, 64)},
        without=("input_ids",),
    ),
    "qwen3_omni_moe_thinker": Recipe(
        config={"audio_config.n_window": 50, "audio_config.n_window_infer": 100},
        inputs={"input_features": randn(3, 128, 100), "feature_attention_mask": ones(3, 100)},
    ),
    "rag": Recipe(
        start=lambda cls: cls(question_encoder=transformers.DPRConfig(), generator=transformers.BartConfig()),
        config={"n_docs": 2},
        inputs={
            "input_ids": ints(60, 3, 9),
            "decoder_input_ids": ints(60, 3, 6),
            "context_input_ids": ints(60, 6, 9),
            "context_attention_mask": ones(6, 9),
            "doc_scores": randn(3, 2),
        },
        without=("decoder_attention_mask",),
    ),
    "sam2": Recipe(
        config=SAM2_SIZES,
        inputs={"pixel_values": randn(3, 3, 64, 64), "input_points": randn(3, 1, 2, 2), "input_labels": ones(3, 1, 2)},
    ),
    "tvp": Recipe(
        start=resnet(),
        config={"visual_prompt_size": 8, "max_img_size": 64, "num_frames": 4},
        inputs={"pixel_values": randn(1, 4, 3, 64, 64), "input_ids": ints(60, 1, 9), "attention_mask": ones(1, 9)},
    ),
    "unlimited_ocr": Recipe(
        config={
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.sam_config.downsample_channels": [64, 64],
        }
    ),
    "unlimited_ocr_vision": Recipe(config={"sam_config.downsample_channels": [64, 64]}),
    # The first frame of a video alone: memories are attended to from the second on.
    "sam2_video": Recipe(
        config={
            **SAM2_SIZES,
            "image_size": 64,
            "memory_attention_rope_feat_sizes": [4, 4],
            "memory_encoder_output_channels": 16,
        },
        inputs={"inference_session": session("Sam2VideoInferenceSession", 64), "frame_idx": 0},
    ),
    "sam3_tracker_video": Recipe(
        config={
            **SAM3_SIZES,
            "image_size": 32,
            "memory_attention_rope_feat_sizes": [4, 4],
            "memory_encoder_output_channels": 16,
        },
        inputs={"inference_session": session("Sam3TrackerVideoInferenceSession", 32), "frame_idx": 0},
    ),
    "sam3_tracker": Recipe(
        config=SAM3_SIZES,
        inputs={"pixel_values": randn(3, 3, 32, 32), "input_points": randn(3, 1, 2, 2), "input_labels": ones(3, 1, 2)},
    ),
    "vibevoice": Recipe(
        config={"audio_config.num_filters": 4, "audio_token_id": 110},
        inputs={
            "input_values": randn(3, 1, 6400),
            "padding_mask": ones(3, 6400),
            "input_ids": holders(110, 2),
        },
    ),
    "vibevoice_acoustic_tokenizer_decoder": Recipe(
        config={"num_filters": 4}, inputs={"hidden_states": randn(3, 64, 9)}
    ),
    "vibevoice_acoustic_tokenizer_encoder": Recipe(
        config={"num_filters": 4}, inputs={"hidden_states": randn(3, 1, 6400)}
    ),
    "vibevoice_asr": Recipe(
        config={
            "acoustic_tokenizer_encoder_config.num_filters": 4,
            "semantic_tokenizer_encoder_config.num_filters": 4,
            "audio_token_id": 110,
        },
        inputs={
            "input_values": randn(3, 1, 6400),
            "padding_mask": ones(3, 6400),
            "input_ids": holders(110, 2),
        },
    ),
    "vitmatte": Recipe(
        inputs={"pixel_values": randn(3, 4, 64, 64)},
        config={
            "fusion_hidden_sizes": [64, 32, 16, 16],
            "backbone_config.num_channels": 4,
            "backbone_config.image_size": 64,
            "backbone_config.patch_size": 16,
        },
    ),
    "voxtral": Recipe(config={"audio_config.intermediate_size": 256}),
    "voxtral_realtime": Recipe(inputs={"input_ids": ints(60, 3, 8)}),
    "voxtral_realtime_text": Recipe(model="VoxtralRealtimeTextModel", inputs={"t_cond": randn(1, 64)}),
    "xcodec": Recipe(config={"codebook_dim": 1088}, inputs={"input_values": randn(3, 1, 4000)}),
    "xcodec2": CODEC,
}
