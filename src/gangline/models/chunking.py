"""Which families transformers computes right when a prompt is fed in chunks (``prefill_chunk_size``)."""

from transformers import PreTrainedConfig

# Found by running every family both ways (transformers 5.23): these give other tokens in chunks, or refuse.
_UNSAFE = {"glm5_next", "hy_v4", "jamba", "minimax"}


def is_chunk_safe(config: PreTrainedConfig) -> bool:
    """Whether feeding a prompt in chunks gives the tokens of feeding it whole.

    Composite models are counted out: the positions of their other modalities follow from the whole prompt.
    Encoder-decoders have no prompt to cut.
    """
    composite = config.get_text_config() is not config
    # Sparse attention picks its keys by scores that round differently in chunks, so it may pick others.
    sparse = getattr(config, "index_topk", None) is not None
    return not (composite or sparse or config.is_encoder_decoder or config.model_type in _UNSAFE)
