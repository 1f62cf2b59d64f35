"""Tiny configs of every MoE family of transformers, and random bases made from them.

`FAMILIES` has an entry for each family whose modeling file decorates its experts with `use_experts_implementation`,
and for three MoE families that don't; those that the installed transformers doesn't have are left out. It is the one
place where tests learn how to build a family.
"""

import copy
import functools
import re
from typing import NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB = 96
IMAGE_TOKEN = VOCAB - 1
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


class Family(NamedTuple):
    """How to build a tiny model of a family.

    config: of the language model, beside `COMMON`; E = 6 experts, K = 2.
    variants: name -> entries of the config that differ: what a checkpoint of this family may switch.
    model_type: of the language model's config, where it is not the family's name.
    whole: the multimodal model around the language model (its `model_type` and parts), where there is one. It is the
        variant `"multimodal"`, or the only one where the language model alone has no causal head in transformers.
    why: why a family can't be extended; empty for all others.
    since: the oldest tested transformers in which its router follows the interface; before, it is refused.
    """

    config: dict
    variants: dict = {}
    model_type: str = ""
    whole: dict = {}
    why: str = ""
    since: str = "5.19"


MLA = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXER = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}  # DeepSeek's sparse attention: sees all here
ROUTED = {"n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 24, "intermediate_size": 24}
GROUPED = {**ROUTED, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5}
QWEN = {"num_experts": 6, "moe_intermediate_size": 24, "intermediate_size": 24, "head_dim": 8}
SHARED = {"shared_expert_intermediate_size": 24}
TWO, THREE = {"num_hidden_layers": 2}, {"num_hidden_layers": 3}
ONE, MANY = {"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}
NORM, NO_NORM = {"norm_topk_prob": True}, {"norm_topk_prob": False}
GROUPS, NO_GROUPS = {"n_group": 3, "topk_group": 2}, {"n_group": 1, "topk_group": 1}
TWO_GROUPS = {"n_group": 2, "topk_group": 1}
SWITCHES = {"no_norm": NO_NORM, "no_groups": NO_GROUPS, "two_groups": TWO_GROUPS}  # of DeepSeek-V3 and its heirs
SWITCHES_DENSE = {**SWITCHES, "dense_first": {"first_k_dense_replace": 1}}
GREEDY = {  # of DeepSeek-V2 and its heirs
    "groups": {**GROUPS, "topk_method": "group_limited_greedy"},
    "scaled": {"routed_scaling_factor": 2.5},
}
ALL_SPARSE = {"mlp_layer_types": ["sparse"] * 2}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
DELTA = {  # gated delta net beside attention
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
QWEN_IMAGES = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VOCAB - 2,
    "vision_start_token_id": VOCAB - 3,
    "vision_end_token_id": VOCAB - 4,
}
GLM_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 32,
}
GLM_IMAGES = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VOCAB - 2,
    "image_start_token_id": VOCAB - 3,
    "image_end_token_id": VOCAB - 4,
    "video_start_token_id": VOCAB - 5,
    "video_end_token_id": VOCAB - 6,
}
SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 2,
    "global_attn_indexes": [0],
    "downsample_channels": [8, 16],
    "mlp_dim": 16,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}

FAMILIES = {
    "afmoe": Family(
        {
            **QWEN,
            **THREE,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "sliding_window": 16,
            "route_scale": 1.5,
        },
        {"no_dense": {"num_dense_layers": 0}},
    ),
    "aria": Family(
        {**TWO, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 24},
        model_type="aria_text",
        whole={
            "model_type": "aria",
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "projector_patch_to_query_dict": {"4": 2},
            "image_token_index": IMAGE_TOKEN,
        },
    ),
    "axk1": Family({**GROUPED, **MLA, **TWO, "first_k_dense_replace": 0}, SWITCHES_DENSE),
    "axk2": Family(
        {**ROUTED, **MLA, **INDEXER, **TWO, "first_k_dense_replace": 0, "gated_norm_rank": 4, "head_dim": 8},
        {"no_norm": NO_NORM, "groups": GROUPS, "two_groups": TWO_GROUPS, "dense_first": {"first_k_dense_replace": 1}},
    ),
    "bailing_hybrid": Family(
        {
            **GROUPED,
            **MLA,
            **TWO,
            "num_local_experts": 6,
            "first_k_dense_replace": 0,
            "head_dim": 8,
            "layer_group_size": 2,
            "num_mtp_layers": 0,
        },
        SWITCHES_DENSE,
    ),
    "beam": Family(
        {**QWEN, **TWO, **GROUPS, **ALL_SPARSE, "sliding_window": 16, "routed_scaling_factor": 1.5}, SWITCHES
    ),
    "cohere2_moe": Family(
        {**QWEN, **TWO, "sliding_window": 16, "num_shared_experts": 1, "first_k_dense_replace": 0},
        {
            "sigmoid": {"expert_selection_fn": "sigmoid"},
            "sigmoid_no_norm": {"expert_selection_fn": "sigmoid", **NO_NORM},
            "no_shared": {"num_shared_experts": 0},
            "summed": {"shared_expert_combination_strategy": "sum"},
            "dense_first": {"first_k_dense_replace": 1},
        },
    ),
    "deepseek_ocr2": Family(
        {**ROUTED, **TWO, **ALL_SPARSE, "num_key_value_heads": 4, "topk_method": "greedy"},
        {**GREEDY, "dense_first": DENSE_FIRST},
        whole={
            "model_type": "deepseek_ocr2",
            "vision_config": {
                "sam_config": SAM,
                "encoder_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                },
            },
            "image_token_id": IMAGE_TOKEN,
        },
        model_type="deepseek_ocr2_text",
    ),
    "deepseek_v2": Family(
        {**ROUTED, **MLA, **TWO, "topk_method": "greedy", "first_k_dense_replace": 0},
        {**GREEDY, "dense_first": {"first_k_dense_replace": 1}},
    ),
    "deepseek_v3": Family(
        {
            "n_routed_experts": 6,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "first_k_dense_replace": 0,
            "n_group": 3,
            "topk_group": 2,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_shared_experts": 1,
        },
        {**SWITCHES_DENSE, "one_expert": ONE, "three_experts": MANY},
    ),
    "deepseek_v32": Family(
        {**GROUPED, **MLA, **INDEXER, **TWO, "first_k_dense_replace": 0, "head_dim": 8}, SWITCHES_DENSE
    ),
    "deepseek_v4": Family(
        {
            **TWO,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "q_lora_rank": 16,
            "mlp_layer_types": ["moe"] * 2,
            "layer_types": ["sliding_attention"] * 2,
            "partial_rotary_factor": 0.5,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "sliding_window": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 16,
            "num_nextn_predict_layers": 0,
        },
        {
            "hash_first": {"mlp_layer_types": ["hash_moe", "moe"]},
            "sigmoid": {"scoring_func": "sigmoid"},
        },
    ),
    "diffusion_gemma": Family(
        {
            **TWO,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
        },
        model_type="diffusion_gemma_text",
        whole={
            "model_type": "diffusion_gemma",
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
            "canvas_length": 8,
            "image_token_id": IMAGE_TOKEN,
            "boi_token_id": VOCAB - 2,
            "eoi_token_id": VOCAB - 3,
            "tie_word_embeddings": True,
        },
        why="it writes whole blocks by diffusion and is no causal LM",
    ),
    "dots1": Family({**GROUPED, **NORM, **TWO, "num_key_value_heads": 4}, SWITCHES_DENSE),
    "dots3_note": Family(
        {
            **GROUPED,
            **MLA,
            **TWO,
            "num_attention_heads": 4,
            "first_k_dense_replace": 0,
            "shared_experts_intermediate_size": 24,
            "sliding_window": 16,
            "index_topk": 64,
            "index_head_dim": 8,
            "index_n_heads": 2,
        },
        SWITCHES_DENSE,
        model_type="dots3_note_text",
        whole={
            "model_type": "dots3_note",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "moe_intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "pyramid_num_routed": [-1, 4],
                "num_experts_per_tok": 2,
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": 32,
                "feature_size": 16,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCAB - 2,
            "audio_token_id": VOCAB - 3,
        },
    ),
    "ernie4_5_moe": Family(
        {
            **TWO,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "moe_layer_start_index": 0,
        },
        {
            "no_shared": {"moe_num_shared_experts": 0},
            "dense_first": {"moe_layer_start_index": 1},
            "norm_min": {"moe_norm_min": 0.9},
        },
    ),
    "ernie4_5_vl_moe": Family(
        {
            **TWO,
            **ALL_SPARSE,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": [24, 16],
            "intermediate_size": 24,
            **MROPE,
        },
        {"no_shared": {"moe_num_shared_experts": 0}, "dense_first": DENSE_FIRST, "norm_min": {"moe_norm_min": 0.9}},
        model_type="ernie4_5_vl_moe_text",
        whole={
            "model_type": "ernie4_5_vl_moe",
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4},
            "image_token_id": IMAGE_TOKEN,
            "image_start_token_id": VOCAB - 3,
            "image_end_token_id": VOCAB - 4,
            "video_token_id": VOCAB - 2,
            "video_start_token_id": VOCAB - 5,
            "video_end_token_id": VOCAB - 6,
            "tie_word_embeddings": False,
        },
        why="each of its layers has a MoE block for text and one for images",
    ),
    "exaone_moe": Family(
        {
            **QWEN,
            **TWO,
            **GROUPS,
            "num_shared_experts": 1,
            "first_k_dense_replace": 0,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
        },
        SWITCHES_DENSE,
    ),
    "flex_olmo": Family({**TWO, "num_experts": 6, "intermediate_size": 24}, {"norm": NORM}),
    "flint": Family(
        {**QWEN, **SHARED, **TWO, "sliding_window": 16, "mlp_only_layers": []},
        {"no_norm": NO_NORM, "dense_first": {"mlp_only_layers": [0]}},
    ),
    "gemma4": Family(
        {
            **TWO,
            "num_experts": 6,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
        },
        model_type="gemma4_text",
        whole={
            "model_type": "gemma4",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCAB - 2,
            "audio_token_id": VOCAB - 3,
            "tie_word_embeddings": False,
        },
    ),
    "glm4_moe": Family({**GROUPED, **TWO, "first_k_dense_replace": 0, "head_dim": 8}, SWITCHES_DENSE),
    "glm4_moe_lite": Family({**GROUPED, **MLA, **TWO, **ALL_SPARSE}, {**SWITCHES, "dense_first": DENSE_FIRST}),
    "glm4v_moe": Family(
        {**GROUPED, **TWO, "first_k_dense_replace": 0, "head_dim": 16, **MROPE},
        SWITCHES_DENSE,
        model_type="glm4v_moe_text",
        whole={"model_type": "glm4v_moe", "vision_config": GLM_VISION, **GLM_IMAGES},
    ),
    "glm5_next": Family(
        {
            **GROUPED,
            **MLA,
            **INDEXER,
            **TWO,
            **ALL_SPARSE,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 2,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "index_kpool": 2,
        },
        {**SWITCHES, "dense_first": DENSE_FIRST},
        model_type="glm5_next_text",
        whole={
            "model_type": "glm5_next",
            "vision_config": {**GLM_VISION, "projection_intermediate_size": 16},
            **GLM_IMAGES,
        },
    ),
    "glm_moe_dsa": Family(
        {**GROUPED, **MLA, **INDEXER, **TWO, "first_k_dense_replace": 0, "head_dim": 8}, SWITCHES_DENSE
    ),
    "gpt_oss": Family({"num_local_experts": 6, "intermediate_size": 24, "head_dim": 8, "sliding_window": 16}),
    "granitemoe": Family({"num_local_experts": 6, "intermediate_size": 24, "logits_scaling": 2.0}),
    "granitemoe_swa": Family(
        {**TWO, "num_local_experts": 6, "intermediate_size": 24, "sliding_window": 16, "shared_intermediate_size": 24},
        {"no_shared": {"shared_intermediate_size": 0}},
    ),
    "granitemoehybrid": Family(
        {
            **TWO,
            "num_local_experts": 6,
            "intermediate_size": 24,
            "shared_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "granitemoeshared": Family(
        {**TWO, "num_local_experts": 6, "intermediate_size": 24, "shared_intermediate_size": 24},
        {"no_shared": {"shared_intermediate_size": 0}},
    ),
    "hunyuan_v1_moe": Family({**TWO, "num_experts": 6, "moe_topk": 2, "intermediate_size": 24, "head_dim": 8}),
    "hy_v3": Family(
        {
            **QWEN,
            **TWO,
            **ALL_SPARSE,
            "num_shared_experts": 1,
            "router_scaling_factor": 1.5,
        },
        {"dense_first": DENSE_FIRST},
    ),
    "hy_v4": Family(
        {**GROUPED, **MLA, **INDEXER, **TWO, **ALL_SPARSE, "head_dim": 8, "hc_mult": 2},
        {**SWITCHES, "dense_first": DENSE_FIRST},
    ),
    "inkling": Family(
        {
            **TWO,
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "conv_kernel_size": 2,
            "route_scale": 1.5,
            "logits_mup_width_multiplier": 1.0,
        },
        {"dense_first": DENSE_FIRST},
        model_type="inkling_text",  # the multimodal model needs scipy
    ),
    "inkling2": Family(
        {
            **TWO,
            "n_routed_experts": 6,
            "unpadded_vocab_size": VOCAB,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "conv_kernel_size": 2,
            "route_scale": 1.5,
            "n_layers_per_attn_res_block": 1,
        },
        {"sqrtsoftplus": {"scoring_func": "sqrtsoftplus"}},
        model_type="inkling2_text",
        whole={
            "model_type": "inkling2",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "posemb_grid_size": 4,
                "projection_hidden_dim": 16,
                "text_hidden_size": 32,
            },
            "image_token_id": IMAGE_TOKEN,
        },
    ),
    "jamba": Family(
        {
            **TWO,
            "num_experts": 6,
            "intermediate_size": 24,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        {"dense_first": {"expert_layer_period": 2, "expert_layer_offset": 1}, "one_expert": ONE},
        since="5.23",
    ),
    "kimi_linear": Family(
        {
            **GROUPED,
            **MLA,
            **TWO,
            **ALL_SPARSE,
            "num_local_experts": 6,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 2,
        },
        {**SWITCHES, "dense_first": DENSE_FIRST},
    ),
    "kolibri1": Family({**QWEN, **SHARED, **TWO, "sliding_window": 16}, {"norm": NORM}),
    "laguna": Family(
        {**QWEN, **SHARED, **TWO, **ALL_SPARSE, "moe_routed_scaling_factor": 1.5},
        {"softcap": {"moe_router_logit_softcapping": 2.0}, "dense_first": DENSE_FIRST},
    ),
    "lfm2_moe": Family(
        {
            **TWO,
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "num_dense_layers": 0,
            "layer_types": ["conv", "full_attention"],
            "routed_scaling_factor": 1.5,
        },
        {"no_norm": NO_NORM, "no_bias": {"use_expert_bias": False}, "dense_first": {"num_dense_layers": 1}},
    ),
    "mellum": Family({**QWEN, **TWO}, {"no_norm": NO_NORM, "dense_first": DENSE_FIRST}),
    "mimo_v2_flash": Family(
        {**GROUPED, **TWO, **ALL_SPARSE, "head_dim": 8, "v_head_dim": 8, "sliding_window": 16},
        {**SWITCHES, "dense_first": DENSE_FIRST},
    ),
    "minimax": Family(
        {**TWO, "num_local_experts": 6, "intermediate_size": 24, "head_dim": 8, "block_size": 8},
    ),
    "minimax_m2": Family({**TWO, "num_local_experts": 6, "intermediate_size": 24, "head_dim": 8, "rotary_dim": 4}),
    "minimax_m3_vl": Family(
        {
            **TWO,
            **ALL_SPARSE,
            "num_local_experts": 6,
            "intermediate_size": 24,
            "head_dim": 8,
            "dense_intermediate_size": 24,
            "shared_intermediate_size": 24,
            "rotary_dim": 4,
        },
        {"dense_first": DENSE_FIRST},
        model_type="minimax_m3_vl_text",
        whole={
            "model_type": "minimax_m3_vl",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
            },
            "projector_hidden_size": 16,
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": VOCAB - 2,
        },
    ),
    "mistral4": Family({**GROUPED, **MLA, **TWO}, SWITCHES_DENSE),
    "mistral_large4": Family(
        {**GROUPED, **MLA, **INDEXER, **TWO, "first_k_dense_replace": 0, "head_dim": 8},
        {"no_groups": NO_GROUPS, "two_groups": TWO_GROUPS, "dense_first": {"first_k_dense_replace": 1}},
        model_type="mistral_large4_text",
        whole={
            "model_type": "mistral_large4",
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_token_index": IMAGE_TOKEN,
        },
    ),
    "mixtral": Family({"num_local_experts": 6, "intermediate_size": 24}, {"one_expert": ONE, "three_experts": MANY}),
    "muse_spark": Family(
        {
            **TWO,
            "num_local_experts": 6,
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "moe_hidden_size": 16,
            "head_dim": 8,
            "sliding_window": 16,
        },
        {"dense_first": DENSE_FIRST},
        model_type="muse_spark_text",
        whole={
            "model_type": "muse_spark",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "max_position_embeddings": 16,
            },
            "audio_config": {
                "patch_sizes": [2, 2],
                "hidden_sizes": [8, 8],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 32,
            },
            "out_hidden_size": 32,
            "projector_hidden_size": 16,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCAB - 2,
            "audio_token_id": VOCAB - 3,
        },
    ),
    "nemotron_h": Family(
        {
            **GROUPED,
            **THREE,
            "layers_block_type": ["moe", "attention", "moe"],
            "head_dim": 8,
            "moe_shared_expert_intermediate_size": 24,
            "ssm_state_size": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "conv_kernel": 2,
            "chunk_size": 8,
        },
        {
            **SWITCHES,
            "latent": {"moe_latent_size": 16},
            "mamba": {"layers_block_type": ["mamba", "attention", "moe"]},
        },
    ),
    "olmoe": Family({"num_experts": 6, "intermediate_size": 24}, {"norm": NORM}),
    "openai_privacy_filter": Family(
        {**TWO, "num_local_experts": 6, "intermediate_size": 24, "head_dim": 8, "sliding_window": 16},
        why="it has a token-classification head and no other",
    ),
    "phimoe": Family({**TWO, "num_local_experts": 6, "intermediate_size": 24}),
    "qwen2_moe": Family(
        {
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "intermediate_size": 24,
            "decoder_sparse_step": 1,
        },
        {"norm": NORM, "dense_first": {"mlp_only_layers": [0]}},
    ),
    "qwen3_5_moe": Family(
        {**QWEN, **SHARED, **DELTA, **TWO, **MROPE},
        model_type="qwen3_5_moe_text",
        whole={"model_type": "qwen3_5_moe", "vision_config": QWEN_VISION, **QWEN_IMAGES},
    ),
    "qwen3_moe": Family(
        {
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "decoder_sparse_step": 1,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
        {"no_norm": NO_NORM, "dense_first": {"mlp_only_layers": [0]}},
    ),
    "qwen3_next": Family(
        {**QWEN, **SHARED, **DELTA, **TWO}, {"no_norm": NO_NORM, "dense_first": {"mlp_only_layers": [0]}}
    ),
    "qwen3_omni_moe": Family(
        {**QWEN, **TWO, **MROPE},
        {"no_norm": NO_NORM},
        model_type="qwen3_omni_moe_text",
        whole={
            "model_type": "qwen3_omni_moe_thinker",
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "num_mel_bins": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "d_model": 16,
                "max_source_positions": 16,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
            "audio_token_id": VOCAB - 5,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
            "audio_start_token_id": VOCAB - 6,
        },
    ),
    "qwen3_vl_moe": Family(
        {**QWEN, **TWO, **MROPE},
        {"dense_first": {"mlp_only_layers": [0]}},
        model_type="qwen3_vl_moe_text",
        whole={
            "model_type": "qwen3_vl_moe",
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            **QWEN_IMAGES,
        },
    ),
    "qwen4_exp": Family(
        {
            **QWEN,
            **SHARED,
            **DELTA,
            **TWO,
            **MROPE,
            "layer_types": ["linear_attention", "indexed_attention"],
            "hc_count": 2,
            "hc_lowrank": 4,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 2,
        },
        {"no_norm": NO_NORM},
        model_type="qwen4_exp_text",
        whole={"model_type": "qwen4_exp", "vision_config": QWEN_VISION, **QWEN_IMAGES},
    ),
    "solar_open": Family({**GROUPED, **TWO, "head_dim": 8}, SWITCHES),
    "unlimited_ocr": Family(
        {
            **ROUTED,
            **TWO,
            **ALL_SPARSE,
            "num_key_value_heads": 4,
            "topk_method": "greedy",
            "sliding_window": 16,
        },
        {**GREEDY, "dense_first": DENSE_FIRST},
        model_type="unlimited_ocr_text",
        whole={
            "model_type": "unlimited_ocr",
            "vision_config": {
                "sam_config": SAM,
                "encoder_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 4,
                },
            },
            "image_token_id": IMAGE_TOKEN,
        },
    ),
    "zaya": Family(
        {
            **TWO,
            "num_experts": 6,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "router_hidden_size": 16,
        },
        why="its router is a network that hands a state on from layer to layer, and may choose no expert",
    ),
    # MoE families whose experts module has another interface
    "dbrx": Family(
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
        },
        why="its router gives bare logits, its block chooses, and all experts lie in one matrix",
    ),
    "jetmoe": Family(
        {**TWO, "num_local_experts": 6, "intermediate_size": 24, "kv_channels": 8},
        why="its experts take tokens sorted by expert, and its attention heads are routed as well",
    ),
    "llama4": Family(
        {
            **TWO,
            "num_local_experts": 6,
            "num_experts_per_tok": 1,
            "intermediate_size": 24,
            "intermediate_size_mlp": 24,
            "head_dim": 8,
            "attention_chunk_size": 16,
        },
        {"dense_first": {"interleave_moe_layer_step": 2}},
        model_type="llama4_text",
        whole={
            "model_type": "llama4",
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": IMAGE_TOKEN,
        },
        why="its experts get an input scaled by the score, and run on all tokens",
    ),
}
INSTALLED = Version(transformers.__version__)
NEWEST = INSTALLED >= Version("5.23")  # what the table of docs/families.md is of
EVERY = FAMILIES  # of every supported version
FAMILIES = {name: family for name, family in EVERY.items() if (family.model_type or name) in CONFIG_MAPPING_NAMES}
TOO_OLD = {name: family for name, family in FAMILIES.items() if INSTALLED < Version(family.since)}  # here: refused
FAMILIES = {name: family for name, family in FAMILIES.items() if name not in TOO_OLD}
DEFAULT = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss")
DEFAULT = tuple(name for name in DEFAULT if name in FAMILIES)  # in every test


DBRX_NAMES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}


def known(*names):
    """Those of `names` that the installed transformers has."""
    return [name for name in names if name in FAMILIES]


def make_config(name, variant=None):
    """The tiny config of a family; `variant`: one of its `variants` or `"multimodal"`."""
    family = EVERY[name]
    text_type = family.model_type or name
    text = {**COMMON, **family.config, **({} if variant in (None, "multimodal") else family.variants[variant])}
    if name == "dbrx":  # its names of the same things are attributes that can't be given twice
        text = {key: value for key, value in text.items() if key not in DBRX_NAMES}
    if family.whole and (variant == "multimodal" or text_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        whole = copy.deepcopy(family.whole)
        return AutoConfig.for_model(whole.pop("model_type"), text_config={"model_type": text_type, **text}, **whole)
    return AutoConfig.for_model(text_type, **copy.deepcopy(text))


def variants_of(name):
    """Names of a family's variants; `"multimodal"` where the default is the language model alone."""
    alone = EVERY[name].whole and make_config(name).model_type == EVERY[name].model_type
    return [*EVERY[name].variants, *(["multimodal"] if alone else [])]


def auto_class(config):
    """The auto class that a user loads this model with."""
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    return AutoModelForTokenClassification if config.model_type == "openai_privacy_filter" else AutoModel


ROUTER_ROWS = (".gate.weight", ".router.weight", ".wg.weight", ".proj.weight", ".layer.weight", ".out_proj.weight")
CORRECTIONS = ("correction_bias", "expert_bias", "balancing_biases")


@functools.cache
def random_base(name, variant=None):
    """The family's random model in float32, one a process: copy it before changing anything."""
    torch.manual_seed(0)
    config = make_config(name, variant)
    model = auto_class(config).from_config(config).eval()
    with torch.no_grad():  # routers start at zero or near it in some families: make their choices differ
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if any(word in key for word in CORRECTIONS):
                tensor.normal_(std=0.1)
            elif key.endswith(ROUTER_ROWS) and ("router" in key or key.endswith((".gate.weight", ".wg.weight"))):
                tensor.normal_(std=0.5)
            elif key.endswith("per_expert_scale"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("tid2eid"):
                tensor.copy_(torch.stack([torch.randperm(6)[:2] for _ in range(VOCAB)]))
            elif "experts" in key or key.endswith("bias"):
                tensor.normal_(std=0.2)
    return model


def make_family(name, variant=None, dtype=torch.float32, experts_implementation=None, **config):
    """A private copy of the family's random model; `config` is set on its config.

    A causal LM, or the multimodal model where only that has a head. Two families have neither: see their `why`.
    """
    original = random_base(name, variant)
    model = copy.deepcopy(original).to(dtype)
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]  # float32 whatever dtype is asked for
    values = original.state_dict()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key in values and any(pattern.search(key) for pattern in kept):
            tensor.data = values[key].clone()
    if experts_implementation:
        model.set_experts_implementation(experts_implementation)
    for key, value in config.items():
        setattr(model.config, key, value)
    return model
