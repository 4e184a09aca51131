import pytest

from deltaworks.checkpoints.tensor_names import LAYER, is_embeddings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("word_embeddings.weight", True),
        ("model.tok_embeddings.weight", True),
        ("shared.weight", True),
        ("backbone.embeddings.weight", True),
        ("lm_head.weight", False),
        ("transformer.wpe.weight", False),
        ("embeddings.position_embeddings.weight", False),
        ("model.embed_tokens.weight_scale", False),
        ("model.embed_tokens_per_layer.weight", False),
        ("model.layers.0.mlp.shared.weight", False),
    ],
)
def test_embeddings_are_told_by_their_names(name: str, expected: bool) -> None:
    assert is_embeddings(name) == expected


@pytest.mark.parametrize(
    ("name", "index", "rest"),
    [
        ("model.layers.12.mlp.up_proj.weight", "12", ".mlp.up_proj.weight"),
        ("h.0.attn.bias", "0", ".attn.bias"),
        ("transformer.blocks.3.norm.weight", "3", ".norm.weight"),
    ],
)
def test_layers_are_told_by_their_names(name: str, index: str, rest: str) -> None:
    match = LAYER.fullmatch(name)
    assert match is not None
    assert (match["index"], match["rest"]) == (index, rest)
