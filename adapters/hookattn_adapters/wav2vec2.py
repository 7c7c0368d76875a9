"""wav2vec 2.0 and the speech encoders with its attention: HuBERT, UniSpeech."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Wav2Vec2(Adapter):
    """wav2vec 2.0, HuBERT and UniSpeech.

    The stack is ``audio``, not ``encoder``, whichever model is around it. T and S count the frames that the
    convolutions leave.

    There is no option to refuse: ``do_stable_layer_norm`` moves the norms, adapters (``adapter_attn_dim``,
    ``add_adapter``) come after the attention, and masked frames are in the mask.
    """

    name = "wav2vec2"
    covers = (
        "transformers.models.hubert.modeling_hubert",
        "transformers.models.unispeech.modeling_unispeech",
        "transformers.models.wav2vec2.modeling_wav2vec2",
    )
    attention = MappingProxyType(
        {
            "HubertAttention": "self",
            "UniSpeechAttention": "self",
            "Wav2Vec2Attention": "self",
        }
    )
    stack = "audio"
    axes = "frames"
