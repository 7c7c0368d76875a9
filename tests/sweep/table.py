"""What no rule can say, by model type: one entry a type, a line or a few each."""

from __future__ import annotations

import torch

from .recipes import (
    BLOCKS,
    EXPERTS,
    HIERA,
    IMAGE,
    MASKS,
    PART,
    POINTS,
    QWEN4,
    ROPE,
    ROPE3,
    ROPE4,
    SAM,
    SAM2,
    SAM3,
    SAM_CONFIG,
    SERIES,
    SESSION,
    TIMM,
    VQ,
    Recipe,
    first_token,
    grid_positions,
    ints,
    lacks,
    long_mask,
    ones,
    patches,
    randn,
    resnet,
    resnet3,
    session,
)
from .table_media import RECIPES as MEDIA

RECIPES: dict[str, Recipe] = {
    "apertus1p5_vision_tokenizer": Recipe(
        config=VQ,
        model="Apertus1p5VisionTokenizerEncoder",  # the model itself only encodes, and has no forward
        inputs={"pixel_values": randn(3, 3, 8, 8)},
    ),
    "aria": Recipe(config={"projector_patch_to_query_dict": {16: 8}}),
    "autoformer": Recipe(config=SERIES),
    "bamba": Recipe(config={"num_hidden_layers": 2, "attn_layer_indices": [1]}),
    "big_bird": Recipe(
        config={"block_size": 4, "num_random_blocks": 1},
        inputs={
            "input_ids": ints(60, 3, 48),
            "attention_mask": long_mask(48),
            "token_type_ids": lambda: torch.zeros(3, 48, dtype=torch.long),
        },
    ),
    "bigbird_pegasus": Recipe(
        config={"block_size": 4, "num_random_blocks": 1},
        inputs={"input_ids": ints(60, 3, 48), "attention_mask": long_mask(48)},
    ),
    "blip_2_qformer": Recipe(
        inputs={"query_embeds": randn(3, 6, 64), "encoder_hidden_states": randn(3, 7, 64)},
        config={"encoder_hidden_size": 64},
    ),
    "blt": Recipe(inputs={"use_cache": False}),
    "blt_local_decoder": Recipe(
        inputs={"inputs_embeds": randn(3, 9, 64), "patch_embeds": randn(3, 9, 64)}, without=("input_ids",)
    ),
    "blt_local_encoder": Recipe(
        inputs={
            "patch_embeds": randn(3, 9, 64),
            "num_patches": 9,
            "patch_ids": lambda: torch.arange(9)[None].expand(3, -1),
        },
        without=("encoder_attention_mask", "attention_mask"),
    ),
    "bridgetower_vision_model": Recipe(inputs={"image": randn(3, 3, 32, 32)}),
    "chameleon": Recipe(config={"vocabulary_map": {"<image>": 120, "IMGIMGA": 3}}, without=("pixel_values",)),
    "chmv2": Recipe(config={"backbone_config.return_class_token": True}),
    "clap": Recipe(
        config={
            "projection_dim": 64,
            "audio_config.depths": [2, 2],
            "audio_config.num_attention_heads": [2, 4],
            "audio_config.patch_embeds_hidden_size": 32,
            "audio_config.hidden_size": 64,
        },
        inputs={"input_features": randn(3, 1, 64, 64)},
    ),
    "clap_audio_model": Recipe(inputs={"input_features": randn(3, 1, 64, 64)}),
    "clvp": Recipe(
        config={
            "text_config.projection_dim": 256,
            "speech_config.projection_dim": 256,
            "text_config.hidden_size": 128,
            "speech_config.hidden_size": 128,
        },
        inputs={"input_features": randn(3, 80, 20)},
    ),
    "clvp_encoder": Recipe(config={"projection_dim": 256, "hidden_size": 128}),
    "cohere_compass": Recipe(
        config={"text_config.rope_parameters": {"full_attention": ROPE3, "sliding_attention": ROPE3}}
    ),
    "cohere_compass_text": Recipe(config={"rope_parameters": {"full_attention": ROPE3, "sliding_attention": ROPE3}}),
    "conditional_detr": Recipe(start=resnet()),
    "dab-detr": Recipe(start=resnet()),
    "dbrx": Recipe(
        config={"attn_config.kv_n_heads": 2, "attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}
    ),
    "decision_transformer": Recipe(
        inputs={
            "states": randn(3, 5, 17),
            "actions": randn(3, 5, 4),
            "rewards": randn(3, 5, 1),
            "returns_to_go": randn(3, 5, 1),
            "timesteps": lambda: torch.arange(5)[None].expand(3, -1),
            "attention_mask": ones(3, 5),
        }
    ),
    "deepseek_ocr2_encoder": Recipe(inputs={"inputs_embeds": randn(3, 16, 64), "num_patches": 16}),
    "deepseek_ocr2_text": Recipe(config={"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}),
    "deepseek_v2": Recipe(config={"num_experts_per_tok": 2, "topk_method": "greedy"}),
    "deepseek_vl_hybrid": Recipe(inputs={"high_res_pixel_values": randn(3, 3, 32, 32)}),
    "deformable_detr": Recipe(start=resnet3, config={"num_feature_levels": 3}),
    "detr": Recipe(start=resnet()),
    "dia": Recipe(inputs={"decoder_input_ids": ints(60, 3, 6, 9)}),
    "dia_decoder": Recipe(inputs={"input_ids": ints(60, 3, 9, 9)}),
    "diffusion_gemma": Recipe(config={f"text_config.{k}": v for k, v in EXPERTS.items()}),
    "diffusion_gemma_text": Recipe(config=EXPERTS),
    "dinat": Recipe(reason=lacks("natten")),
    "dory": Recipe(
        config={
            "num_hidden_layers": 3,
            "n_input_layers": 1,
            "n_recurrent_layers": 1,
            "n_output_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        }
    ),
    "EvollaModel": Recipe(inputs={"protein_input_ids": ints(20, 3, 11), "protein_attention_mask": ones(3, 11)}),
    "dots1": Recipe(
        config={"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2}
    ),
    "edgetam": Recipe(reason=TIMM),
    "edgetam_mask_decoder": Recipe(inputs=SAM2),
    "edgetam_prompt_encoder": Recipe(inputs=POINTS),
    "edgetam_video": Recipe(
        reason=TIMM, inputs={"inference_session": session("EdgeTamVideoInferenceSession", 64), "frame_idx": 0}
    ),
    "edgetam_video_mask_decoder": Recipe(inputs=SAM2),
    "edgetam_video_prompt_encoder": Recipe(inputs=POINTS),
    "edgetam_vision_model": Recipe(reason=TIMM),
    "embedding_gemma2": Recipe(without=("pixel_values", "input_features", "input_features_mask")),
    "emu3": Recipe(
        config={"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}, "vq_config.base_channels": 32},
        without=("pixel_values",),
    ),
    "ernie4_5_vl_moe": Recipe(
        config={
            "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        }
    ),
    "ernie4_5_vl_moe_text": Recipe(
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}
    ),
    "esm": Recipe(
        config={"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"}
    ),
    "emu3_vqgan": Recipe(
        config={**VQ, "hidden_size": 32}, model="Emu3VQVAEEncoder", inputs={"pixel_values": randn(3, 4, 3, 16, 16)}
    ),
    "esmfold2": Recipe(
        reason="its three-dimensional rotary embedding needs heads of full width, and its trunk all of its sizes"
    ),
    "evolla": Recipe(inputs={"protein_input_ids": ints(20, 3, 11), "protein_attention_mask": ones(3, 11)}),
    "fast_vlm": Recipe(reason=TIMM),
    "fastspeech2_conformer_hifigan": Recipe(inputs={"spectrogram": randn(3, 20, 64)}),
    "fastspeech2_conformer_with_hifigan": Recipe(config={"vocoder_config.model_in_dim": 80}),
    "gemma3n": Recipe(reason=TIMM),
    "gemma3n_audio": Recipe(
        inputs={"audio_mel": randn(3, 64, 128), "audio_mel_mask": lambda: torch.zeros(3, 64, dtype=torch.bool)}
    ),
    "gemma3n_text": Recipe(
        config={
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "intermediate_size": [48, 48, 48, 48],
        }
    ),
    "gemma3n_vision": Recipe(reason=TIMM),
    "gemma4": Recipe(without=("pixel_values", "input_features", "input_features_mask")),
    "gemma4_assistant": Recipe(
        reason="its configuration shares every layer's keys and values, which transformers cannot build a cache for"
    ),
    "gemma4_unified": Recipe(without=("pixel_values", "input_features", "input_features_mask")),
    "gemma4_unified_assistant": Recipe(reason="takes the cache of another model"),
    "gemma4_unified_audio": PART,
    "gemma4_unified_vision": PART,
    "gemma4_vision": Recipe(inputs={"pixel_position_ids": grid_positions}),
    "glm_image_vqmodel": Recipe(inputs={"hidden_states": randn(3, 1536, 4, 4)}),
    "glm5_next": Recipe(config={"text_config.index_kpool": 2}),
    "glm5_next_text": Recipe(config={"index_kpool": 2}),
    "gpt_neo": Recipe(config={"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "granite_docling": Recipe(without=("pixel_values", "pixel_attention_mask")),
    "granite_speech5_ctc": Recipe(inputs={"input_features": randn(3, 60, 320)}),
    "granite_speech5_encoder": Recipe(inputs={"input_features": randn(3, 60, 320)}),
    "granitemoehybrid": Recipe(config={"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}),
    "higgs_audio_v2_tokenizer": Recipe(reason=lacks("torchaudio")),
    "hunyuan_v1_dense": Recipe(
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "alpha": 1000.0}}
    ),
    "hunyuan_v1_moe": Recipe(
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "alpha": 1000.0}}
    ),
    "hunyuan_vl_text": Recipe(
        config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [2, 2, 2, 2]}}
    ),
    "hy_v4_vl_text": Recipe(config={"rope_parameters": ROPE4}),
    "idefics": Recipe(inputs={"pixel_values": randn(3, 1, 3, 32, 32), "image_attention_mask": ones(3, 9, 1)}),
    "idefics2_perceiver": Recipe(inputs={"context": randn(3, 9, 64), "attention_mask": ones(3, 9)}),
    "idefics_perciever": Recipe(part=True, config={"use_resampler": True}),
    "idefics_vision": PART,
    "informer": Recipe(config=SERIES),
    "inkling_audio": Recipe(inputs={"audio_input_ids": ints(10, 3, 9, 80)}),
    "instructblip": Recipe(inputs={"qformer_input_ids": ints(60, 3, 6), "qformer_attention_mask": ones(3, 6)}),
    "instructblipvideo": Recipe(
        config={"video_token_index": 110, "image_token_index": 110},
        inputs={
            "pixel_values": randn(3, 4, 3, 32, 32),
            "qformer_input_ids": ints(60, 3, 6),
            "qformer_attention_mask": ones(3, 6),
        },
    ),
    "jamba": Recipe(
        config={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_hidden_layers": 4,
            "mamba_dt_rank": 8,
        }
    ),
    "kosmos-2": Recipe(inputs={"image_embeds_position_mask": lambda: torch.tensor([[0] * 2 + [1] * 6 + [0]] * 3)}),
    "kyutai_speech_to_text": Recipe(inputs={"input_ids": ints(60, 3, 9, 33)}),
    "layoutlmv2": Recipe(reason=lacks("detectron2")),
    "layoutlmv3": Recipe(config={"coordinate_size": 10, "shape_size": 12, "input_size": 32}),
    "layoutxlm": Recipe(reason=lacks("detectron2")),
    "led": Recipe(
        inputs={"input_ids": ints(60, 3, 16), "attention_mask": long_mask(16), "global_attention_mask": first_token(16)}
    ),
    "levit": Recipe(
        config={"patch_size": 16, "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4]}
    ),
    "lfm2_moe": Recipe(config={"layer_types": ["conv", "full_attention"]}),
    "lightglue": Recipe(
        config={"keypoint_detector_config.keypoint_decoder_dim": 65}, inputs={"pixel_values": randn(3, 2, 1, 64, 64)}
    ),
    "lilt": Recipe(config={"hidden_size": 96}),
    "llama4": Recipe(config={"vision_config.intermediate_size": 256}, without=("pixel_values",)),
    "llama4_vision_model": Recipe(
        config={"pixel_shuffle_ratio": 0.5, "projector_input_dim": 64, "intermediate_size": 256}
    ),
    "longformer": Recipe(
        inputs={"input_ids": ints(60, 3, 16), "attention_mask": long_mask(16), "global_attention_mask": first_token(16)}
    ),
    "longt5": Recipe(config={"encoder_attention_type": "transient-global"}),
    "lw_detr_vit": Recipe(config={"num_windows": 4}),
    "lxmert": Recipe(
        config={"visual_feat_dim": 64}, inputs={"visual_feats": randn(3, 5, 64), "visual_pos": randn(3, 5, 4)}
    ),
    "mamba2": Recipe(config={"num_heads": 8}),
    "mimi": Recipe(config={"codebook_dim": 64, "vector_quantization_hidden_dimension": 64}),
    "mimi_decoder": Recipe(inputs={"latents": randn(3, 64, 9)}),
    "minicpm_ocr_vision": Recipe(
        inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}
    ),
    "minicpmv4_6_vision": Recipe(
        inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}
    ),
    "minicpmv4_7_vision": Recipe(
        inputs={"pixel_values": randn(1, 3, 8, 384), "target_sizes": lambda: torch.tensor([[4, 4]] * 3)}
    ),
    "ministral": Recipe(config={"rope_parameters": ROPE}),
    "mllama": Recipe(
        inputs={
            "pixel_values": randn(3, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": ones(3, 1),
            "aspect_ratio_mask": ones(3, 1, 4),
            "cross_attention_mask": ones(3, 9, 1, 4),
        },
        config={"vision_config.vision_output_dim": 128},
    ),
    "mllama_vision_model": Recipe(
        inputs={
            "pixel_values": randn(3, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": ones(3, 1),
            "aspect_ratio_mask": ones(3, 1, 4),
        }
    ),
    "mobilevitv2": Recipe(inputs={"pixel_values": randn(3, 3, 128, 128)}),
    "moonshine_streaming": Recipe(config={"num_key_value_heads": 4, "encoder_config.num_key_value_heads": 4}),
    "moshi_depth": Recipe(
        config={"input_size": 64},
        inputs={"input_ids": ints(60, 3, 3), "last_hidden_state": randn(3, 1, 64)},
        without=("attention_mask",),
    ),
    "musicgen_decoder": Recipe(inputs={"input_ids": ints(60, 12, 9)}, without=("attention_mask",)),
    "musicgen_melody_decoder": Recipe(inputs={"input_ids": ints(60, 12, 9)}, without=("attention_mask",)),
    "nemotron_h": Recipe(config={"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}),
    "nemotron_h_omni": Recipe(without=("pixel_values", "image_grid_hw", "input_features")),
    "neomme": Recipe(without=("pixel_values",)),
    "nougat": Recipe(
        reason="its configuration class names a part that transformers does not map (donut_swin), and cannot be made"
    ),
    "omdet-turbo": Recipe(reason=TIMM),
    "oneformer": Recipe(
        inputs={"task_inputs": ints(60, 3, 77), "pixel_values": randn(3, 3, 128, 128)}, without=("pixel_mask",)
    ),
    "patchtsmixer": Recipe(inputs={"past_values": randn(3, 32, 1)}),
    "patchtst": Recipe(inputs={"past_values": randn(3, 32, 1)}),
    "pe_audio_video": Recipe(reason=TIMM),
    "pe_audio_video_encoder": Recipe(reason=TIMM),
    "pe_video": Recipe(reason=TIMM),
    "pe_video_encoder": Recipe(reason=TIMM),
    "pegasus_x": Recipe(config={"block_size": 8, "num_global_tokens": 4}),
    "perceiver": Recipe(config={"d_model": 64}, inputs={"inputs": randn(3, 9, 64), "attention_mask": ones(3, 9)}),
    "perception_lm": Recipe(reason=TIMM),
    "phi4_multimodal_audio": Recipe(
        config={"depthwise_separable_out_channel": 64, "ext_pw_out_channel": 64},
        inputs={"hidden_states": randn(3, 64, 80), "mask": lambda: None},
    ),
    "pix2struct": Recipe(
        inputs={"flattened_patches": patches(770), "attention_mask": ones(3, 16)},
        config={"vision_config.patch_embed_hidden_size": 768},
    ),
    "pix2struct_text_model": Recipe(config={"initializer_range": 0.02}),
    "pix2struct_vision_model": Recipe(
        inputs={"flattened_patches": patches(770), "attention_mask": ones(3, 16)},
        config={"patch_embed_hidden_size": 768},
    ),
    "pocket_tts_audio_tokenizer_decoder": Recipe(inputs={"latents": randn(3, 64, 9)}),
    "pop2piano": Recipe(without=("input_features",)),
    "pp_chart2table_vision": PART,
    "pp_ocrv5_server_det": Recipe(reason=BLOCKS),
    "pp_ocrv6_medium_det": Recipe(reason=BLOCKS),
    "pp_ocrv6_small_det": Recipe(reason="a convolutional net without attention, whose neck fits its full widths alone"),
    "qwen2_5_omni_audio_encoder": Recipe(
        inputs={"input_features": randn(128, 60), "feature_lens": lambda: torch.tensor([40, 20])},
        without=("attention_mask",),
    ),
    "qwen2_5_omni_bigvgan": Recipe(
        inputs={"mel_spectrogram": randn(3, 64, 20)}, config={"upsample_initial_channel": 64}
    ),
    "qwen2_5_omni_token2wav": Recipe(
        config={
            "dit_config.mel_dim": 80,
            "dit_config.enc_emb_dim": 64,
            "bigvgan_config.upsample_initial_channel": 64,
            "bigvgan_config.mel_dim": 80,
        },
        inputs={"code": ints(50, 1, 12), "conditioning": randn(1, 64), "reference_mel": randn(1, 24, 80)},
    ),
    "qwen2_5_omni_dit": Recipe(
        config={"mel_dim": 80, "enc_emb_dim": 64},
        inputs={
            "hidden_states": randn(2, 24, 80),
            "condition_vector": randn(2, 24, 80),
            "speaker_embedding": randn(2, 24, 64),
            "quantized_code": ints(50, 2, 12),
            "time_step": lambda: torch.tensor(0.5),
            "apply_cfg": False,
        },
    ),
    "qwen3_omni_moe_talker_code_predictor": Recipe(inputs={"inputs_embeds": randn(3, 9, 64)}, without=("input_ids",)),
    "qwen4_exp": Recipe(config={f"text_config.{k}": v for k, v in QWEN4.items()}),
    "qwen4_exp_text": Recipe(config=QWEN4),
    "recurrent_gemma": Recipe(config={"num_hidden_layers": 3}),
    "reformer": Recipe(
        config={
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [16, 48],
            "attn_layers": ["local", "lsh", "local", "lsh"],
            "num_hidden_layers": 4,
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
            "num_hashes": 2,
            "num_buckets": 4,
        }
    ),
    "rf_detr": Recipe(inputs={"pixel_values": randn(3, 3, 64, 64)}),
    "sam": Recipe(config={**SAM_CONFIG, "vision_config.num_pos_feats": 32}, inputs={"input_points": randn(3, 1, 2, 2)}),
    "sam2_hiera_det_model": Recipe(config=HIERA),
    "sam2_mask_decoder": Recipe(inputs=SAM2),
    "sam2_prompt_encoder": Recipe(inputs=POINTS),
    "sam2_video_mask_decoder": Recipe(inputs=SAM2),
    "sam2_video_prompt_encoder": Recipe(inputs=POINTS),
    "sam2_vision_model": Recipe(
        config={f"backbone_config.{k}": v for k, v in HIERA.items()}
        | {"backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        inputs={"pixel_values": randn(3, 3, 64, 64)},
    ),
    "sam3_detr_decoder": Recipe(
        inputs={**SAM3, "vision_pos_encoding": randn(3, 16, 64), "spatial_shapes": lambda: torch.tensor([[4, 4]])}
    ),
    "sam3_detr_encoder": Recipe(
        inputs={
            **SAM3,
            "vision_features": lambda: [randn(3, 64, 4, 4)()],
            "vision_pos_embeds": lambda: [randn(3, 64, 4, 4)()],
        }
    ),
    "sam3_geometry_encoder": Recipe(reason=lacks("torchvision")),
    "sam3_lite_text_detr_decoder": Recipe(
        inputs={**SAM3, "vision_pos_encoding": randn(3, 16, 64), "spatial_shapes": lambda: torch.tensor([[4, 4]])}
    ),
    "sam3_lite_text_detr_encoder": Recipe(
        inputs={
            **SAM3,
            "vision_features": lambda: [randn(3, 64, 4, 4)()],
            "vision_pos_embeds": lambda: [randn(3, 64, 4, 4)()],
        }
    ),
    "sam3_lite_text_geometry_encoder": Recipe(reason=lacks("torchvision")),
    "sam3_lite_text_mask_decoder": Recipe(
        inputs={
            "decoder_queries": randn(3, 6, 64),
            "backbone_features": lambda: [randn(3, 64, 16, 16)(), randn(3, 64, 8, 8)(), randn(3, 64, 4, 4)()],
            "encoder_hidden_states": randn(3, 16, 64),
            "prompt_features": randn(3, 5, 64),
        }
    ),
    "sam3_mask_decoder": Recipe(
        inputs={
            "decoder_queries": randn(3, 6, 64),
            "backbone_features": lambda: [randn(3, 64, 16, 16)(), randn(3, 64, 8, 8)(), randn(3, 64, 4, 4)()],
            "encoder_hidden_states": randn(3, 16, 64),
            "prompt_features": randn(3, 5, 64),
        }
    ),
    "sam3_tracker_mask_decoder": Recipe(inputs=SAM2),
    "sam3_tracker_prompt_encoder": Recipe(inputs=POINTS),
    "sam3_tracker_video_mask_decoder": Recipe(inputs=SAM2),
    "sam3_tracker_video_prompt_encoder": Recipe(inputs=POINTS),
    "sam3_video": Recipe(reason=SESSION),
    "sam_hq": Recipe(
        config={**SAM_CONFIG, "vision_config.num_pos_feats": 32, "mask_decoder_config.vit_dim": 64},
        inputs={"input_points": randn(3, 1, 2, 2)},
    ),
    "sam_hq_mask_decoder": Recipe(
        inputs={**SAM, "hq_token_only": False, "intermediate_embeddings": lambda: [randn(3, 4, 4, 64)()]}
    ),
    "sam_hq_prompt_encoder": MASKS,
    "sam_mask_decoder": Recipe(inputs=SAM),
    "sam_prompt_encoder": MASKS,
    "sapiens2_head": Recipe(part=True, model="Sapiens2ForSemanticSegmentation"),
    "sapiens2": Recipe(
        config={
            "num_key_value_heads_per_layer": [4, 2],
            "num_first_full_attention_layers": 1,
            "num_last_full_attention_layers": 1,
        }
    ),
    "seggpt": Recipe(
        config={"merge_index": 0, "intermediate_hidden_state_indices": [1], "image_size": [64, 32]},
        inputs={
            "pixel_values": randn(3, 3, 32, 32),
            "prompt_pixel_values": randn(3, 3, 32, 32),
            "prompt_masks": randn(3, 3, 32, 32),
        },
    ),
    "speech-encoder-decoder": Recipe(without=("input_features",)),
    "speecht5": Recipe(
        inputs={"input_values": randn(3, 9, 64), "decoder_input_values": randn(3, 6, 64)}, model="SpeechT5Model"
    ),
    "speecht5_hifigan": Recipe(inputs={"spectrogram": randn(3, 20, 64)}),
    "step3p5": Recipe(config={"sliding_window": 4}),
    "step3p5_vision": Recipe(inputs={"pixel_values": randn(3, 3, 32, 32)}),
    "step3p7": Recipe(config={"text_config.sliding_window": 4}),
    "superglue": Recipe(
        config={"keypoint_detector_config.keypoint_decoder_dim": 65}, inputs={"pixel_values": randn(3, 2, 3, 64, 64)}
    ),
    "superpoint": Recipe(config={"keypoint_decoder_dim": 65}, inputs=IMAGE),
    "swin2sr": Recipe(
        config={"num_heads": [2, 2, 2, 2], "embed_dim": 32, "depths": [2, 2], "window_size": 4, "image_size": 16}
    ),
    "t5_gemma_module": PART,
    "t5gemma2_decoder": Recipe(
        config={"dropout_rate": 0.0},
        inputs={"encoder_hidden_states": randn(3, 7, 64), "encoder_attention_mask": ones(3, 7)},
    ),
    "t5gemma2_encoder": Recipe(config={"text_config.dropout_rate": 0.0, "dropout_rate": 0.0}),
    "t5gemma2_text": Recipe(config={"dropout_rate": 0.0}),
    "table-transformer": Recipe(start=resnet()),
    "tapas": Recipe(inputs={"token_type_ids": lambda: torch.zeros(3, 9, 7, dtype=torch.long)}),
    "time_series_transformer": Recipe(config=SERIES),
    "timesfm": Recipe(
        inputs={
            "past_values": randn(3, 64),
            "past_values_padding": lambda: torch.zeros(3, 64, dtype=torch.long),
            "freq": lambda: torch.zeros(3, 1, dtype=torch.long),
        }
    ),
    "timm_backbone": Recipe(reason=TIMM),
    "timm_wrapper": Recipe(reason=TIMM),
    "unlimited_ocr_text": Recipe(config={"mlp_layer_types": ["dense", "sparse"]}),
    "unlimited_ocr_vision_encoder": Recipe(
        inputs={"pixel_values": randn(3, 3, 32, 32), "patch_embeds": randn(3, 64, 4, 4)}
    ),
    "uvdoc": Recipe(reason="a convolutional net whose widths do not shrink; no attention"),
    "vibevoice_diffusion": PART,
    "video_llama_3": Recipe(inputs={"image_merge_sizes": lambda: torch.tensor([2, 2, 2])}),
    "video_llama_3_vision": Recipe(inputs={"merge_sizes": lambda: torch.tensor([2, 2, 2])}),
    "videomt": Recipe(inputs={"pixel_values_videos": randn(2, 2, 3, 32, 32)}),
    "videoprism_vision_model": Recipe(
        inputs={"pixel_values_videos": randn(3, 4, 3, 32, 32)}, without=("pixel_values",)
    ),
    "vipllava": Recipe(config={"vision_feature_layers": [-2, -1]}),
    "vits": Recipe(config={"upsample_initial_channel": 32}),
    "xlstm": Recipe(config={"qk_dim_factor": 1.0}),
    "xmod": Recipe(config={"default_language": "en_XX"}),
    "zamba": Recipe(
        config={
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        }
    ),
    "zoedepth": Recipe(config={"bottleneck_features": 64, "fusion_hidden_size": 64}),
}
RECIPES.update(MEDIA)
