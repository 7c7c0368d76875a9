"""What a forward takes, made from its signature and the configuration.

Three rows: a whole one, one padded on the left, one padded on the right. Where a name leaves open which shape is meant
(frames first or channels first, one image or several), there are alternatives, and the first that the model runs is
taken. The placeholders of images and sounds in the tokens are as many as the model's own features.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

ROWS, LENGTH = 3, 9
WANTED = """image_merge_sizes image_grid_hw
input_ids attention_mask decoder_input_ids decoder_attention_mask pixel_values pixel_mask bbox input_features
input_values image_grid_thw video_grid_thw grid_thw image_sizes spatial_shapes pixel_attention_mask mm_token_type_ids
input_features_mask feature_attention_mask image_patches_indices token_type_ids padding_mask
image_position_ids pixel_position_ids""".split()

Make = Callable[["Inputs"], list[Any]]


class Inputs:
    """The making of one model's inputs.

    Args:
        model: the small model.
        config: its configuration.
        given: inputs by name, where a recipe has them.
        without: names that are left out.
    """

    def __init__(
        self, model: nn.Module, config: PreTrainedConfig, given: dict[str, Any], without: tuple[str, ...] = ()
    ):
        self.model, self.config, self.given = model, config, given
        self.parameters = {
            n: p
            for n, p in inspect.signature(model.forward).parameters.items()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)
        }
        required = [n for n, p in self.parameters.items() if p.default is p.empty]
        self.names = [n for n in self.parameters if (n in WANTED or n in required or n in given) and n not in without]
        fed = {"input_ids", "decoder_input_ids", "pixel_values", "input_features", "input_values"}
        if "inputs_embeds" in self.parameters and not fed & set(self.names):
            self.names.append("inputs_embeds")
        if _crosses(model) and "encoder_hidden_states" in self.parameters:
            self.names += [
                n
                for n in ("encoder_hidden_states", "encoder_attention_mask")
                if n in self.parameters and n not in self.names and n not in without
            ]
        self.generator = torch.Generator().manual_seed(11)
        self.made: dict[str, Any] = {}
        self.length = LENGTH
        self.media: list[tuple[int, int]] = []
        self.refused: list[str] = []

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Sets of inputs, the likeliest first."""
        media = [n for n in self.names if n in MEDIA and n not in self.given]
        open_names = [n for n in self.names if n in ALTERNATIVES and n not in self.given]
        choices = [range(len(ALTERNATIVES[n])) for n in open_names]
        for chosen in itertools.islice(itertools.product(*choices), 60):
            self.generator.manual_seed(11)
            self.made = {n: (v() if callable(v) else v) for n, v in self.given.items()}
            self.media, self.length = [], LENGTH
            if isinstance(self.made.get("input_ids"), Tensor):
                self.length = self.made["input_ids"].shape[1]
            pick = dict(zip(open_names, chosen, strict=True))
            try:
                for name in media:
                    self._make(name, pick.get(name, 0))
                if "input_ids" in self.names and "input_ids" not in self.given:
                    self.media = self._placeholders()
                    self.length = LENGTH + sum(n for _, n in self.media)
                for name in self.names:
                    if name not in self.made:
                        self._make(name, pick.get(name, 0))
            except _Unfit as error:
                if str(error):
                    self.refused.append(str(error))
                continue
            yield {n: v for n, v in self.made.items() if (v is not None and n in self.parameters) or n in self.given}

    def _make(self, name: str, choice: int) -> None:
        if name in ALTERNATIVES:
            self.made[name] = ALTERNATIVES[name][choice](self)
        elif name in RULES:
            self.made[name] = RULES[name](self)
        else:
            raise NoRuleError(f"no rule for the input {name!r} of {type(self.model).__name__}")

    # ----------------------------------------------------------------------------------------- pieces

    def find(self, *names: str, default: Any = None, within: str = "") -> Any:
        """An attribute of the configuration or, failing that, of one of its parts."""
        for config in parts_of(self.config, within):
            for name in names:
                value = vars(config).get(name)
                if value is not None and not isinstance(value, dict):
                    return value
        return default

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def mask(self, length: int | None = None) -> Tensor:
        """ROWS length: whole, padded left, padded right."""
        length = length or self.length
        mask = torch.ones(ROWS, length, dtype=torch.long)
        left, right = (length // 5, length // 4) if length > 200 else (min(2, length // 3), min(3, length // 3))
        mask[1, :left] = 0
        mask[2, length - right :] = 0
        return mask

    def tokens(self, length: int | None = None) -> Tensor:
        """Text, with the padding token where the mask is 0 and placeholders in the middle."""
        vocab = self.find("vocab_size", default=99)
        most = min([vocab if isinstance(vocab, int) else 99, 99])
        ids = self.ints(min(10, most // 2), most, ROWS, length or self.length)
        pad = self.find("pad_token_id", default=0)
        for token, _ in self.media:
            ids[ids == token] = most - 1 if token != most - 1 else most - 2
        if length is None:
            start = 4
            for token, n in self.media:
                ids[:, start : start + n] = token
                start += n
        if "attention_mask" in self.names:
            ids[self.mask(ids.shape[1]) == 0] = pad if isinstance(pad, int) and 0 <= pad < most else 0
        return ids

    def side(self, within: str = "vision") -> tuple[int, int]:
        """The height and width of an image."""
        size = self.find("image_size", "img_size", "crop_size", "image_resolution", default=32, within=within)
        if isinstance(size, (list, tuple)) and isinstance(size[0], int):
            return int(size[0]), int(size[-1])
        return (size, size) if isinstance(size, int) else (32, 32)

    def channels(self) -> int:
        """Of an image."""
        n = self.find("num_channels", "in_channels", "in_chans", "input_channels", default=3, within="vision")
        return n if isinstance(n, int) else 3

    def patch(self) -> int:
        """The side of a patch."""
        p = self.find("patch_size", "spatial_patch_size", default=8, within="vision")
        while not isinstance(p, int):
            p = p[-1]
        return p

    def _placeholders(self) -> list[tuple[int, int]]:
        """(token, how many a row) for images and sounds, from the model's own features."""
        found = []
        for getter, names, tokens in (
            (
                "get_image_features",
                ("pixel_values",),
                ("image_token_id", "image_token_index", "img_token_id", "media_placeholder_token_id"),
            ),
            ("get_video_features", ("pixel_values_videos",), ("video_token_id", "video_token_index")),
            (
                "get_audio_features",
                ("input_features", "input_values", "audio_values", "input_audio_embeds"),
                ("audio_token_id", "audio_token_index"),
            ),
        ):
            own = next((n for n in names if self.made.get(n) is not None), None)
            token = next(
                (t for c in parts_of(self.config, "") for t in (vars(c).get(n) for n in tokens) if isinstance(t, int)),
                None,
            )
            owner = next((m for m in self.model.modules() if hasattr(m, getter)), None)
            if own is None or token is None or owner is None:
                continue
            method = getattr(owner, getter)
            takes = inspect.signature(method).parameters
            args = {n: v for n, v in self.made.items() if n in takes}
            try:
                with torch.no_grad():
                    features = method(**args)
            except Exception as error:
                raise _Unfit(said(error)) from error
            n = _count(features)
            if n:
                found.append((token, -(-n // ROWS)))
        return found


class NoRuleError(Exception):
    """An input that no rule makes."""


class _Unfit(Exception):
    """These alternatives do not go together."""


def said(error: BaseException) -> str:
    """What a model said and where, in a line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}{place}"


def _count(features: Any) -> int:
    """How many feature vectors there are."""
    if not isinstance(features, (Tensor, list, tuple)):
        features = (
            getattr(features, "pooler_output", None)
            if getattr(features, "pooler_output", None) is not None
            else getattr(features, "last_hidden_state", features)
        )
    if isinstance(features, (list, tuple)):
        return sum(_count(f) for f in features)
    if isinstance(features, Tensor):
        return features.numel() // max(features.shape[-1], 1)
    return 0


def _crosses(model: nn.Module) -> bool:
    return any("cross" in n.lower() or "encoder_attn" in n or "encdec" in n.lower() for n, _ in model.named_modules())


def parts_of(config: PreTrainedConfig, within: str) -> list[PreTrainedConfig]:
    """The configuration and its parts; those named like ``within`` first, when it is given."""
    found: list[tuple[int, int, PreTrainedConfig]] = []

    def walk(one: PreTrainedConfig, name: str, depth: int) -> None:
        rank = 0 if within and within in name else 1
        if not within and any(w in name for w in ("text", "decoder", "language", "llm")):
            rank = 0
        found.append((rank if depth else (1 if within else 0), len(found), one))
        for key, value in vars(one).items():
            if isinstance(value, PreTrainedConfig):
                walk(value, f"{name}.{key}", depth + 1)

    walk(config, "", 0)
    return [c for _, _, c in sorted(found, key=lambda x: x[:2])]


# --------------------------------------------------------------------------------------------------- rules


def _image(i: Inputs, *lead: int) -> Tensor:
    return i.randn(*lead, i.channels(), *i.side())


def _grid(i: Inputs) -> tuple[int, int, int]:
    return 1, 8, 4


def _has_grid(i: Inputs) -> bool:
    return any(n in i.parameters for n in ("image_grid_thw", "grid_thw", "image_grid_hw"))


def _flat(i: Inputs) -> Tensor:
    if not _has_grid(i):
        raise _Unfit
    t, h, w = _grid(i)
    time = i.find("temporal_patch_size", "patch_temporal", default=1, within="vision")
    return i.randn(ROWS * t * h * w, i.channels() * time * i.patch() ** 2)


def _flat_patches(i: Inputs) -> Tensor:
    if not _has_grid(i):
        raise _Unfit
    t, h, w = _grid(i)
    return i.randn(ROWS * t * h * w, i.channels(), i.patch(), i.patch())


def _packed(i: Inputs) -> Tensor:
    return i.randn(ROWS, 16, i.channels() * i.patch() ** 2)


def _patches5(i: Inputs) -> Tensor:
    return i.randn(1, ROWS * 32, i.channels(), i.patch(), i.patch())


def _frames(i: Inputs) -> Tensor:
    n = i.find("num_frames", "frames_per_clip", default=2, within="vision")
    return _image(i, ROWS, n)


def _mel(i: Inputs) -> int:
    n = i.find(
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        "n_mels",
        "mel_bins",
        "input_size",
        "feature_size",
        "num_mel_filters",
        "subsampling_input_size",
        default=80,
        within="audio",
    )
    return n if isinstance(n, int) else 80


def _time(i: Inputs) -> int:
    most = i.find("max_source_positions", default=0, within="audio")
    return 2 * most if most and most < 300 else 64


def _latents(i: Inputs) -> Tensor:
    return i.randn(ROWS, i.length, i.find("hidden_size", "d_model", "embed_dim", "dim", default=64))


def _bbox(i: Inputs) -> Tensor:
    box = i.ints(0, 60, ROWS, i.length, 4)
    return torch.cat([box[..., :2], box[..., :2] + 1 + box[..., 2:] // 2], -1)


def _pixel_mask(i: Inputs) -> Tensor:
    h, w = i.side()
    mask = torch.ones(ROWS, h, w, dtype=torch.long)
    mask[2, :, w // 2 :] = 0
    return mask


def _media_types(i: Inputs) -> Tensor:
    kinds = torch.zeros(ROWS, i.length, dtype=torch.long)
    start = 4
    for kind, (_, n) in enumerate(i.media, 1):
        kinds[:, start : start + n] = kind
        start += n
    return kinds


def _mask(i: Inputs) -> Tensor | None:
    if "input_values" in i.made and "input_ids" not in i.names and i.made["input_values"].dim() == 2:
        return i.mask(i.made["input_values"].shape[-1])
    if "input_features" in i.made and "input_ids" not in i.names:
        return i.mask(i.made["input_features"].shape[1])
    return i.mask()


ALTERNATIVES: dict[str, list[Callable[[Inputs], Any]]] = {
    "pixel_values": [
        _flat,
        lambda i: _image(i, ROWS),
        lambda i: _image(i, ROWS, 1),
        lambda i: _image(i, ROWS, 2),
        _frames,
        _packed,
        lambda i: _image(i, ROWS, 4),
        _patches5,
        _flat_patches,
        lambda i: _image(i, ROWS * i.find("num_frames", default=4, within="vision")),
    ],
    "input_features": [
        lambda i: i.randn(ROWS, _mel(i), _time(i)),
        lambda i: i.randn(ROWS, _time(i), _mel(i)),
        lambda i: i.randn(ROWS, 1, _time(i), _mel(i)),
        lambda i: i.randn(ROWS, 64, 128),
        lambda i: i.randn(ROWS, 128, 64),
        lambda i: i.randn(ROWS, 128, 128),
        lambda i: i.randn(ROWS, 80, 128),
    ],
    "image_sizes": [lambda i: torch.tensor([i.side()] * ROWS), lambda i: None],
    "input_values": [
        lambda i: i.randn(ROWS, 4000),
        lambda i: i.randn(ROWS, 1, 4000),
        lambda i: i.randn(ROWS, i.find("max_length", default=64), _mel(i)),
    ],
    "attention_mask": [_mask, lambda i: None],
    "hidden_states": [
        _flat,
        _flat_patches,
        _latents,
        lambda i: i.randn(ROWS * 16, 64),
        lambda i: i.randn(ROWS, 64, 4, 4),
    ],
}
MEDIA = (
    "image_merge_sizes",
    "image_grid_hw",
    "padding_mask",
    "pixel_values",
    "input_features",
    "input_values",
    "image_grid_thw",
    "grid_thw",
    "image_sizes",
    "spatial_shapes",
    "pixel_attention_mask",
    "input_features_mask",
    "feature_attention_mask",
    "pixel_values_videos",
)
RULES: dict[str, Callable[[Inputs], Any]] = {
    "input_ids": lambda i: i.tokens(),
    "decoder_input_ids": lambda i: i.tokens(6),
    "decoder_attention_mask": lambda i: i.mask(6),
    "inputs_embeds": _latents,
    "encoder_hidden_states": lambda i: i.randn(
        ROWS,
        7,
        i.find(
            "cross_hidden_size",
            "encoder_hidden_size",
            "cross_attention_hidden_size",
            "hidden_size",
            "d_model",
            default=64,
        ),
    ),
    "encoder_attention_mask": lambda i: i.mask(7),
    "pixel_mask": _pixel_mask,
    "bbox": _bbox,
    "image_grid_thw": lambda i: torch.tensor([_grid(i)] * ROWS),
    "grid_thw": lambda i: torch.tensor([_grid(i)] * ROWS),
    "video_grid_thw": lambda i: None,
    "spatial_shapes": lambda i: torch.tensor([(4, 4)] * ROWS),
    "pixel_attention_mask": lambda i: (
        torch.ones(
            [n for d, n in enumerate(i.made["pixel_values"].shape) if d != i.made["pixel_values"].dim() - 3],
            dtype=torch.long,
        )
        if i.made["pixel_values"].dim() > 3
        else torch.ones(ROWS, 16, dtype=torch.long)
    ),
    "mm_token_type_ids": _media_types,
    "token_type_ids": lambda i: torch.zeros(ROWS, i.length, dtype=torch.long),
    "input_features_mask": lambda i: (
        torch.ones(ROWS, max(i.made["input_features"].shape[1:]), dtype=torch.long)
        if "input_features" in i.made
        else None
    ),
    "feature_attention_mask": lambda i: torch.ones(ROWS, i.made["input_features"].shape[-1], dtype=torch.long),
    "padding_mask": lambda i: (
        torch.ones(i.made["input_values"].shape, dtype=torch.bool)
        if isinstance(i.made.get("input_values"), Tensor)
        else None
    ),
    "image_merge_sizes": lambda i: torch.tensor([2] * ROWS),
    "image_grid_hw": lambda i: torch.tensor([_grid(i)[1:]] * ROWS),
    "pixel_values_videos": lambda i: _frames(i),
    "past_values": lambda i: i.randn(
        ROWS,
        i.find("context_length", "seq_length", default=32) + max([0, *i.find("lags_sequence", default=[0])]),
        i.find("num_input_channels", default=1),
    ).squeeze(-1),
    "past_observed_mask": lambda i: torch.ones_like(i.made["past_values"]),
    "past_time_features": lambda i: i.randn(
        ROWS, i.made["past_values"].shape[1], i.find("num_time_features", default=1) or 1
    ),
    "future_values": lambda i: i.randn(ROWS, i.find("prediction_length", default=8)),
    "future_time_features": lambda i: i.randn(
        ROWS, i.find("prediction_length", default=8), i.find("num_time_features", default=1) or 1
    ),
    "position_ids": lambda i: torch.arange(i.length)[None].expand(ROWS, -1),
    "image_position_ids": lambda i: None,
    "pixel_position_ids": lambda i: None,
    "image_patches_indices": lambda i: None,
}
