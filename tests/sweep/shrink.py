"""Make any configuration of transformers small by the names and values of its attributes, sub-configurations included.

All widths become 64, all stacks 4 heads of 16 over 2 key heads and 2 layers, so that towers and their projections keep
fitting each other. Of layers that differ (hybrids) the first of each sort is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, FF, VOCAB, IMAGE, PATCH = 64, 4, 2, 16, 2, 48, 128, 32, 8
FIRST_SPECIAL = 100  # ids of special tokens that would not fit are moved to here and above; text stays below

_LAYERS = re.compile(
    r"^(num_hidden_layers|num_layers|n_layers?|layers|depth|.*(?<!adapter)(?<!add)_(hidden_)?layers|.*_depth|encoder_layers|decoder_layers"
    r"|num_(encoder|decoder)_layers|num_(encoder_|decoder_)?blocks|.*_num_(hidden_)?layers|num_.*_layers)$"
)
_NOT_LAYERS = re.compile(
    r"(residual|upsampl|postnet|prenet|conv|adapter|kernel|shared|fov|wavenet|iou|lqe|dense|max_window|separable"
    r"|aux_layers|mlp_only|look_|attn_layers|proj_layers|fuser|encoder_blocks|gnn|iou_head|head_depth)"
)
_HEADS = re.compile(
    r"^(num_attention_heads|num_heads|n_heads?|.*_attention_heads|attention_heads|.*_num_heads|.*resampler_heads"
    r"|resampler_n_heads|encoder_attention_heads|.*num_heads|linear_num_value_heads|decoder_num_attention_heads|index_n_heads)$"
)
_KV = re.compile(
    r"^(num_key_value_heads|n_kv_heads|num_kv_heads|.*_num_key_value_heads|num_key_value_attention_heads|linear_num_key_heads|.*_kv_heads)$"
)
_HEAD_DIM = re.compile(
    r"^(.*_)?(head_dim|attention_head_size|attention_head_dim|d_kv|d_head|dim_head|kv_channels|head_size)$"
)
_FF = re.compile(
    r"^(.*_)?(intermediate_size|ffn?_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|dim_feedforward|mlp_dim|d_inner|feedforward_dim|feed_forward_(hidden_)?size|mlp_hidden_size|ff_dim|expert_dim|intermediate_dim)$"
)
_WIDTH = re.compile(
    r"^(.*_)?(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_dim|embedding_size|hidden_dim|projection_dim"
    r"|proj_dim|output_dim|output_size|width|embed_size|inner_dim|latent_dim|out_dim|hidden_sz|projection_size|q_lora_rank|lora_rank"
    r"|proj_codevector_dim|codevector_dim|embed_proj_dim|output_proj_dims|hidden_channels|output_channels|fpn_channels|out_channels"
    r"|query_dim|cross_dim|lru_width|model_dim|feature_size_dim|hidden_act_dim|qk_channels|v_channels|num_latent_dim|vit_dim"
    r"|hidden_size_global|d_latents|reduce_dim|project_dim|proj_size|adapter_in_dim|adapter_out_dim|hidden_units|pooler_output_size|conv_dim)$"
)
_VOCAB = re.compile(r"^(.*_)?(vocab_sizes?|n_vocab|vocab_size_per_layer_input|byte_group_vocab)$")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_(source|target|speech|text)_positions|max_seq(uence)?_(len|length)|seq_len|max_sequence_length|seq_length"
    r"|decoder_max_position_embeddings|encoder_max_position_embeddings|original_max_position_embeddings|t2u_max_position_embeddings|max_len|.*_max_position_embeddings)$"
)
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|moe_num_experts|num_routed_experts|.*_num_experts|num_experts_total)$"
)
_TOPK = re.compile(
    r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|moe_k|top_k_experts|experts_per_token|.*_experts_per_tok|top_k)$"
)
_IMAGE = re.compile(r"^(.*_)?(image_size|img_size|crop_size|image_resolution|spec_size)$")
_PATCH = re.compile(r"^(patch_size|patch_sizes|patch_size_(height|width)|vision_patch_size)$")
_WINDOW = re.compile(
    r"^(sliding_window|sliding_window_size|attention_window_size|attention_chunk_size|keep_window_size|local_attention_window_len)$"
)
_SPECIAL = re.compile(r"(_token_id|_token_ids|_token_index|_token_indices|_index|_idx|_id|_token)$")
_INDEXES = re.compile(
    r"(indexes|indices|ind(ex|ices)?|_ids|_layers|layer_id|hook_ids|_idxs|_blocks|feature_layer|_layer)$"
)
_LATENTS = re.compile(
    r"^(num_queries|num_object_queries|num_query_tokens|num_latents|.*n_latents|num_detection_tokens|.*num_latents|latent_query_num|num_denoising|two_stage_num_proposals|visual_prompt_size)$"
)


_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
_SMALL = {
    "mm_tokens_per_image": 4,
    "num_frames": 4,
    "frames_per_clip": 4,
    "upsample_groups": WIDTH,
    "mamba_d_head": HEAD,
    "first_k_dense_replace": 1,
    "num_position_embeddings": 16,
    "ngram_vocab_size_base": 256,
    "context_length": 32,
    "index_topk": 4,
    "image_seq_length": 16,
    "max_length": 128,
    "moe_num_shared_experts": 1,
    "chunk_size": 16,
    "n_shared_experts": 1,
    "post_conv_in_channels": WIDTH,
    "text_embed_dim": WIDTH,
    "n_window": 8,
    "attention_window": 4,
    "local_radius": 3,
    "global_block_size": 4,
    "num_experts_per_tok": 2,
    "keypoint_decoder_dim": 65,
    "vision_output_dim": WIDTH,
    "projector_input_dim": WIDTH,
    "projector_output_dim": WIDTH,
    "n_groups": 1,
    "adapter_input_size": WIDTH,
    "nemo_conv_channels": WIDTH,
}


@dataclasses.dataclass
class Case:
    """What is shared while one configuration, with all that it contains, is made small."""

    special: dict[int, int] = dataclasses.field(default_factory=dict)
    source: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def token(self, wanted: int) -> int:
        """An id of a special token that fits the small vocabulary; the same for the same."""
        if wanted < FIRST_SPECIAL:
            return wanted
        return self.special.setdefault(wanted, VOCAB - 1 - len(self.special) % (VOCAB - FIRST_SPECIAL))


def shrink(config: PreTrainedConfig, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of the same class.

    Args:
        config: any configuration, usually its class's default.
        overrides: what to set whatever the rules say: a name, or a dotted name within sub-configurations.
    """
    return _shrink(config, Case(overrides=overrides or {}), "")


def _shrink(config: PreTrainedConfig, case: Case, prefix: str) -> PreTrainedConfig:
    cls = type(config)
    case.source = source_of(cls)
    values = dict(vars(config))
    fields = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    layers, kept = _layers_kept(values, fields)
    changed: dict[str, Any] = {}
    hierarchical = any(
        isinstance(values.get(n), (list, tuple)) and len(values[n]) > 1 for n in ("depths", "blocks_per_stage")
    )
    for name, value in values.items():
        if name not in fields and not isinstance(value, PreTrainedConfig):
            continue
        if isinstance(value, PreTrainedConfig):
            changed[name] = _shrink(value, case, f"{prefix}{name}.")
            continue
        case.source = source_of(cls)
        new = _value(name, value, values, layers, kept, hierarchical, case)
        if new is not value and new != value:
            changed[name] = new
    for name in ("out_features", "out_indices"):
        changed.pop(name, None)
    changed.update(_backbone(values, changed))
    for path, value in case.overrides.items():
        if path.startswith(prefix) and "." not in path[len(prefix) :]:
            changed[path[len(prefix) :]] = value
    keep = _told(config, fields, changed)
    made = cls(**{**keep, **{k: v for k, v in changed.items() if v is not DROP}})
    return made


DROP = object()  # as an override: leave it to the class


def _told(config: PreTrainedConfig, fields: set[str], changed: Mapping[str, Any]) -> dict[str, Any]:
    """What this configuration has that its class's default has not."""
    try:
        default = vars(type(config)())
    except Exception as error:  # noqa: BLE001 - a class without a default of its own: then all of it is told
        default = {"": error}
    common = {
        "transformers_version",
        "dtype",
        "id2label",
        "label2id",
        "return_dict",
        "output_hidden_states",
        "architectures",
    }
    told = {}
    for name in fields - common - set(changed):
        if name in vars(config) and (name not in default or default[name] != vars(config)[name]):
            told[name] = vars(config)[name]
    return told


def _layers_kept(values: Mapping[str, Any], fields: set[str]) -> tuple[int, list[int] | None]:
    """How many layers there were, and which are kept: one of each sort that the per-layer lists tell apart."""
    n = next(
        (
            values[k]
            for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "layers")
            if isinstance(values.get(k), int)
        ),
        0,
    )
    lists = [
        tuple(v)
        for k, v in values.items()
        if k in fields and isinstance(v, (list, tuple)) and len(v) == n and n > 4 and not _INDEXES.search(k)
    ]
    if not lists:
        return n, None
    sorts: dict[Any, int] = {}
    for i in range(n):
        key = tuple(repr(x[i]) for x in lists if len({repr(y) for y in x}) <= 4)
        sorts.setdefault(key, i)
    kept = sorted(sorts.values())[:6]
    for i in range(n):
        if len(kept) >= LAYERS:
            break
        if i not in kept:
            kept.append(i)
    return n, sorted(kept)


def _value(
    name: str, value: Any, values: Mapping[str, Any], n: int, kept: list[int] | None, stages: bool, case: Case
) -> Any:
    if value is None and name in _PLACEHOLDERS and any(isinstance(v, PreTrainedConfig) for v in values.values()):
        return VOCAB - 20 - _PLACEHOLDERS.index(name)
    if (
        value is None
        and isinstance(values.get("num_attention_heads"), int)
        and name in ("num_key_value_heads", "head_dim")
    ):
        return KV_HEADS if name == "num_key_value_heads" else HEAD
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (list, tuple)):
        return _list(name, value, values, n, kept, case)
    if isinstance(value, dict):
        return _dict(name, value, values, _default_sections(case.source))
    if isinstance(value, float):
        return value
    if not isinstance(value, int):
        return value
    return _int(name, value, values, n, kept, stages, case)


def _heads_of(name: str, values: Mapping[str, Any]) -> Any:
    for theirs in (
        name.replace("key_value_attention", "attention").replace("key_value", "attention"),
        name.replace("num_key_value", "num"),
        "num_attention_heads",
    ):
        if isinstance(values.get(theirs), int) and theirs != name:
            return values[theirs]
    return None


def _int(name: str, x: int, values: Mapping[str, Any], n: int, kept: list[int] | None, stages: bool, case: Case) -> int:
    if _LAYERS.search(name) and not _NOT_LAYERS.search(name):
        return min(x, len(kept) if kept and x == n else LAYERS)
    if _SPECIAL.search(name) and not name.endswith(("layer_id", "layer_index", "layer_idx")) and x >= 0:
        return case.token(x) if ("token" in name or x >= VOCAB) else x
    if _KV.search(name):
        return min(x, HEADS if x == _heads_of(name, values) else KV_HEADS)
    if _HEADS.search(name):
        return min(x, HEADS)
    if _VOCAB.search(name):
        return min(x, VOCAB)
    if _EXPERTS.search(name):
        return min(x, 4)
    if _TOPK.search(name):
        return min(x, 2)
    if name in ("n_group", "topk_group", "num_expert_groups", "n_groups_topk", "topk_groups"):
        return min(x, 1)
    if name in _SMALL:
        return min(x, _SMALL[name])
    for pattern, most in ((_FF, FF), (_POSITIONS, 128), (_WINDOW, 4), (_LATENTS, 6)):
        if pattern.search(name):
            return min(x, most)
    if _IMAGE.search(name):
        return min(x, (4 if "window_size" in values else 2) * IMAGE if stages else IMAGE)
    if name in ("num_heads", "mamba_n_heads", "n_mamba_heads") and any(
        isinstance(values.get(e), int) for e in ("expand", "mamba_expand")
    ):
        return min(
            x, next(values[e] for e in ("expand", "mamba_expand") if isinstance(values.get(e), int)) * WIDTH // HEAD
        )
    if _PATCH.search(name):
        return min(x, PATCH)
    if name == "rotary_dim":
        return min(x, HEAD // 2)
    rope, nope = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if isinstance(rope, int) and isinstance(nope, int) and rope:  # latent attention: a head is two parts
        if name == "qk_rope_head_dim" or (name == "head_dim" and x == rope):
            return min(x, HEAD // 2)
        if name in ("qk_head_dim", "head_dim") and x == rope + nope:
            return HEAD + HEAD // 2
    if _HEAD_DIM.search(name):
        return min(x, HEAD)
    if _WIDTH.search(name):
        return min(x, WIDTH // 2 if stages and name == "embed_dim" else WIDTH)
    if name == "window_size":
        return 4 * PATCH if x > 50 else min(x, 4)
    return x


_WIDTH_LISTS = re.compile(
    r"^(.*_)?(hidden_sizes|embed_dims?|embed_dim_per_stage|in_channels|channel_list|channels|feature_dims|hidden_dims)$"
)


def _list(name: str, x: Any, values: Mapping[str, Any], n: int, kept: list[int] | None, case: Case) -> Any:
    ints = bool(x) and all(isinstance(i, int) and not isinstance(i, bool) for i in x)
    made: list[Any] | None = None
    if name in ("depths", "blocks_per_stage", "num_blocks_per_stage"):
        made = [min(i, 2) for i in x]
    elif kept and len(x) == n and not _INDEXES.search(name):
        made = [x[i] for i in kept]
        if ints and len(set(x)) > 1 and _HEADS.search(name.replace("_per_layer", "")):
            made = [min(i, HEADS) for i in made]
    elif ints and n and _INDEXES.search(name) and max(x) <= n and "token" not in name:
        last = (len(kept) if kept else LAYERS) - 1
        made = sorted({min(i, last) if i >= 0 else max(i, -last - 1) for i in x}) if max(x) > last else list(x)
    elif ints and _HEADS.search(name) and isinstance(values.get("embed_dim"), int) and "depths" in values:
        made = [2, 4, 8, 8, 8, 8][: len(x)]
    elif ints and _SPECIAL.search(name) and "token" in name:
        made = [case.token(i) for i in x]
    elif ints and _IMAGE.search(name):
        made = [min(i, IMAGE) for i in x]
    elif ints and _PATCH.search(name):
        made = [min(i, PATCH) for i in x] if len(set(x)) == 1 else list(x)
    elif ints and name.endswith("channels") and len(set(x)) == 1 and x[0] == 256:
        made = [WIDTH] * len(x)
    elif name == "attention_window":
        made = [4] * len(x[: len(kept) if kept else LAYERS])
    elif name == "image_grid_pinpoints":
        made = [[IMAGE, IMAGE]]
    elif ints and _VOCAB.search(name):
        made = [min(i, VOCAB) for i in x]
    elif ints and name == "mrope_section":
        made = _sections(len(x), HEAD // 2)
    if made is None or made == list(x):
        return x
    return type(x)(made)


def _dict(name: str, x: dict[str, Any], values: Mapping[str, Any], sections: int) -> Any:
    if not name.startswith("rope"):
        return x
    made = {}
    if sections and "rope_type" in x and "mrope_section" not in x:
        x = {**x, "mrope_section": [0] * sections}
    for key, value in x.items():
        if isinstance(value, dict):
            value = _dict("rope", value, values, sections)
        elif key == "mrope_section":
            value = _sections(len(value), int(HEAD * x.get("partial_rotary_factor", 1)) // 2)
        elif key in ("short_factor", "long_factor"):
            value = value[: HEAD // 2]
        elif key == "original_max_position_embeddings":
            value = min(value, 64)
        made[key] = value
    return made


def _default_sections(source: str) -> int:
    """How many sections a rotary embedding has that reads them with a default; 0: it does not."""
    found = re.search(r'"mrope_section", \[([\d, ]+)\]', source)
    return len(found[1].split(",")) if found else 0


def _sections(n: int, total: int) -> list[int]:
    part = [total // n] * n
    part[0] += total - sum(part)
    return part


def _backbone(values: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Stages that a backbone hands out: still as many, and the last ones."""
    indices = values.get("_out_indices")
    if not indices:
        return {}
    if "depths" in values or "num_hidden_layers" not in changed:
        return {"out_indices": list(indices)}
    n = max(changed["num_hidden_layers"], len(indices))
    return {"num_hidden_layers": n, "out_indices": list(range(n - len(indices) + 1, n + 1))}


@functools.cache
def source_of(config: type) -> str:
    """The text of the models in the package of a configuration class."""
    package = importlib.import_module(config.__module__).__file__
    return "".join(p.read_text() for p in sorted(Path(package or "").parent.glob("modeling_*.py")))
