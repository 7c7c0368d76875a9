"""RoBERTa and the other models with BERT's attention: XLM-R, CamemBERT, ELECTRA, ERNIE."""

from __future__ import annotations

from types import MappingProxyType

from .bert import Bert


class Roberta(Bert):
    """RoBERTa (also with norms before), XLM-R (XL, too), CamemBERT, ELECTRA and ERNIE.

    There is no option to refuse: as in BERT the scale is an argument of the kernel, and ``is_decoder`` only changes
    the mask; ELECTRA's ``embedding_size`` is widened before the first layer, and ERNIE's task types are added there.
    """

    name = "roberta"
    covers = (
        "transformers.models.camembert.modeling_camembert",
        "transformers.models.electra.modeling_electra",
        "transformers.models.ernie.modeling_ernie",
        "transformers.models.roberta.modeling_roberta",
        "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm",
        "transformers.models.xlm_roberta.modeling_xlm_roberta",
        "transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl",
    )
    attention = MappingProxyType(
        {
            "CamembertCrossAttention": "cross",
            "CamembertSelfAttention": "self",
            "ElectraCrossAttention": "cross",
            "ElectraSelfAttention": "self",
            "ErnieCrossAttention": "cross",
            "ErnieSelfAttention": "self",
            "RobertaCrossAttention": "cross",
            "RobertaSelfAttention": "self",
            "RobertaPreLayerNormCrossAttention": "cross",
            "RobertaPreLayerNormSelfAttention": "self",
            "XLMRobertaCrossAttention": "cross",
            "XLMRobertaSelfAttention": "self",
            "XLMRobertaXLCrossAttention": "cross",
            "XLMRobertaXLSelfAttention": "self",
        }
    )
