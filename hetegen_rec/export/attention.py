"""Attention over few tokens, as the processors that score do it fast."""

from torch import nn

from hetegen_rec.models.attention import GuidedAttention, product_attention

_MOST_LOGIT_BYTES = 16 << 10
"""Of a row, over all heads: the logits of some hundred rows stay in the cache of a core."""
_FLOAT_BYTES = 4


def attend_by_products(network: nn.Module, num_elements: int) -> None:
    """Lets the attention of a network over few elements be two batched matrix products, also in a graph.

    A graph of any number of rows cannot cut them into pieces as `attend` does, and has the fused kernel
    otherwise. Products keep the logits, so they are not for long sequences. The results are the same but for
    rounding.

    Args:
        network: whose attention is changed in place.
        num_elements: of a row that it attends over.
    """
    for module in network.modules():
        if isinstance(module, GuidedAttention):
            logit_bytes = module.num_heads * num_elements**2 * _FLOAT_BYTES
            if logit_bytes <= _MOST_LOGIT_BYTES:
                module.attend = product_attention
