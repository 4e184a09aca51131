"""What tensors are told under."""

import pytest

from deltaworks.merging.summary import _place, layer_of


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        pytest.param("model.embed_tokens.weight", (0, 0), id="embeddings"),
        pytest.param("model.layers.12.mlp.weight", (1, 12), id="layer"),
        pytest.param("model.norm.weight", (2, 0), id="after the layers"),
        pytest.param("\N{SUPERSCRIPT TWO}", (2, 0), id="a digit that is not a decimal"),
    ],
)
def test_the_order_of_layers(tensor: str, place: tuple[int, int]) -> None:
    assert _place(layer_of(tensor)) == place
