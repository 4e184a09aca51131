"""What a tensor is by its name: in a layer, embeddings, a head, or a buffer that loaders compute."""

import re
from typing import Final

from deltaworks.checkpoints.header import TensorInfo

LAYER: Final = re.compile(r"(?P<stack>(?:^|.*?\.)(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)(?P<rest>\..*)")
"""Name of a tensor inside a layer: the prefix of its stack of layers, the layer's number, and the rest."""
HEAD: Final = "lm_head.weight"
"""The head that a model may leave out because it is tied to the embeddings."""
HEADS: Final = (HEAD, "embed_out.weight")

_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|shared|embeddings)\.weight$"
)
_FREQUENCIES = re.compile(r"(?:^|[._])(?:(?:original_)?inv_freq|cos_cached|sin_cached)$")
_POSITIONS = re.compile(r"(?:^|\.)(?:position_ids|token_type_ids)$")
_CAUSAL_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attn)\.(?:attention\.)?(?:bias|causal_mask)$")
_MASKED_VALUE = re.compile(r"(?:^|\.)(?:attn|attention|self_attn)\.(?:attention\.)?masked_bias$")


def is_embeddings(name: str) -> bool:
    """Whether a tensor holds a row for each token of the vocabulary that goes in."""
    return _EMBEDDINGS.search(name) is not None and not LAYER.fullmatch(name)


def is_recomputed(tensor: TensorInfo) -> bool:
    """Whether a tensor is a buffer that every current loader computes itself and ignores in files.

    That is rotary frequencies, position numbers and causal masks, which older versions of transformers saved. Masks
    are told from biases of the same name by their shapes.
    """
    name, shape = tensor.name, tensor.shape
    if _FREQUENCIES.search(name) or _POSITIONS.search(name):
        return True
    if _CAUSAL_MASK.search(name):
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_MASKED_VALUE.search(name)) and tensor.count == 1
