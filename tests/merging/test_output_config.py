"""config.json says what the tensors of the output are."""

from typing import Any

import pytest

from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.output_config import describe_output
from deltaworks.merging.plan import InputTensor, PlannedTensor

CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
VLM = {"architectures": ["LlavaForConditionalGeneration"]}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor(name: str, shape: tuple[int, ...] = (64, 8), dtype: str = "F32") -> PlannedTensor:
    return PlannedTensor(name, DTYPES[dtype], shape, (InputTensor(0, name),), Copy(32))


def tied(config: dict[str, Any], *names: str, parents: tuple[dict[str, Any], ...] = ()) -> Any:
    """What the output says of its head: at the top, and in nested configurations by their keys."""
    found = describe_output(config, [tensor(n) for n in names], "float32", parents or (config,))
    places = {"": found} | {k: v for k, v in found.items() if isinstance(v, dict)}
    return {place: part.get("tie_word_embeddings") for place, part in places.items()}


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        (CAUSAL, (EMBEDDINGS, HEAD), {"": False}),
        (CAUSAL | {"tie_word_embeddings": True}, (EMBEDDINGS, HEAD), {"": False}),
        (CAUSAL | {"tie_word_embeddings": False}, (EMBEDDINGS, HEAD), {"": False}),
        (CAUSAL, (EMBEDDINGS,), {"": True}),
        (CAUSAL | {"tie_word_embeddings": False}, (EMBEDDINGS,), {"": True}),
        (CAUSAL | {"tie_word_embeddings": True}, (EMBEDDINGS,), {"": True}),
        (VLM | {"text_config": {}}, ("language_model.embed_tokens.weight", "language_model.lm_head.weight"),
         {"": False, "text_config": False}),
        (VLM | {"text_config": {"tie_word_embeddings": True}}, (EMBEDDINGS, HEAD), {"": False, "text_config": False}),
        (VLM | {"tie_word_embeddings": False, "llm_config": {}}, (EMBEDDINGS,), {"": True, "llm_config": True}),
        # Heads of other names, and models without one.
        ({"architectures": ["GPTNeoXForCausalLM"]}, ("gpt_neox.embed_in.weight", "embed_out.weight"), {"": False}),
        ({"architectures": ["InternLM2ForCausalLM"]}, ("model.tok_embeddings.weight", "output.weight"), {"": None}),
        ({"architectures": ["LlamaForSequenceClassification"]}, (EMBEDDINGS,), {"": None}),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ("transformer.wte.weight",), {"": True}),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, ("shared.weight", HEAD), {"": None}),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "tie_word_embeddings": False},
         ("shared.weight", HEAD), {"": False}),
    ],
)  # fmt: skip
def test_the_head_that_was_merged_is_the_head_that_loads(
    config: dict[str, Any], names: tuple[str, ...], expected: dict[str, Any]
) -> None:
    assert tied(config, *names) == expected


def test_the_innermost_text_part_and_those_around_it_say_the_same() -> None:
    config = VLM | {"thinker_config": {"text_config": {"tie_word_embeddings": True}, "vision_config": {}}}
    found = describe_output(config, [tensor("thinker.lm_head.weight")], "float32", [config])
    assert found["thinker_config"] == {
        "text_config": {"tie_word_embeddings": False}, "vision_config": {}, "tie_word_embeddings": False,
    }  # fmt: skip
    assert config["thinker_config"] == {"text_config": {"tie_word_embeddings": True}, "vision_config": {}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"torch_dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "float32", "torch_dtype": "float32"}),
        ({"text_config": {"torch_dtype": "torch.bfloat16"}, "vision_config": {"dtype": "float16"}},
         {"torch_dtype": "float32", "text_config": {"torch_dtype": "float32"}, "vision_config": {"dtype": "float32"}}),
        ({"text_config": {"torch_dtype": None}, "other": {"dtype": "int8"}},
         {"torch_dtype": "float32", "text_config": {"torch_dtype": None}, "other": {"dtype": "int8"}}),
    ],
)  # fmt: skip
def test_element_types_are_named_wherever_the_config_names_them(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert describe_output(config, [tensor("w")], "float32", [config]) == expected


def test_parts_of_another_element_type_keep_theirs() -> None:
    config = {"text_config": {"dtype": "bfloat16"}, "vision_config": {"dtype": "float16"}}
    tensors = [tensor("w"), tensor("vision.w", dtype="F16")]
    expected = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"dtype": "float16"}}
    assert describe_output(config, tensors, "float32", [config]) == expected
