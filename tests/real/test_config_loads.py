"""What a merge says in config.json is what transformers 4 and 5 load: the head, the layers, the element type."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from merges import merge
from peers import transformers_python

from deltaworks.catalog.store import Catalog

pytestmark = pytest.mark.real

SCRIPT = Path(__file__).parent / "transformers_models.py"
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip


def family(kind: str, **more: Any) -> dict[str, Any]:
    return SMALL | {"model_type": kind} | more


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "n_positions": 128}
LLAVA = {
    "auto": "image", "model_type": "llava", "vision_config": VISION, "image_token_index": 63,
    "text_config": family("llama", tie_word_embeddings=True), "tie_word_embeddings": True,
}  # fmt: skip
LLAVA_UNTIED = LLAVA | {"text_config": family("llama", tie_word_embeddings=False), "tie_word_embeddings": False}
TIED_KEY, TYPES_KEY = ["tie_word_embeddings"], ["layer_types"]
WHOLE = """merge_method: task_arithmetic
base_model: {0}/base
dtype: float32
models:
- model: {0}/a
  parameters: {{weight: 0.5}}
- model: {0}/b
  parameters: {{weight: 0.5}}
"""
STACK = """merge_method: passthrough
slices:
- sources: [{{model: {0}/a, layer_range: [0, 3]}}]
- sources: [{{model: {0}/b, layer_range: [1, 4]}}]
"""
CASES: dict[str, tuple[dict[str, dict[str, Any]], str, str]] = {
    # One parent has a head of its own, and the base ties it by the default of its class.
    "gemma-untied": (
        {
            "base": family("gemma", dropped=TIED_KEY),
            "a": family("gemma", tie_word_embeddings=False),
            "b": family("gemma"),
        },
        WHOLE,
        "float32",
    ),
    "gemma-tied": (dict.fromkeys(("base", "a", "b"), family("gemma", dropped=TIED_KEY)), WHOLE, "float32"),
    "llama-untied": (dict.fromkeys(("base", "a", "b"), family("llama", dropped=TIED_KEY)), WHOLE, "float32"),
    "llama-tied": (dict.fromkeys(("base", "a", "b"), family("llama", tie_word_embeddings=True)), WHOLE, "float32"),
    "llava-untied": ({"base": LLAVA, "a": LLAVA_UNTIED, "b": LLAVA}, WHOLE, "float32"),
    "llava-tied": (dict.fromkeys(("base", "a", "b"), LLAVA), WHOLE, "float32"),
    "qwen3-stack": (dict.fromkeys(("a", "b"), family("qwen3")), STACK, "bfloat16"),
    "gemma2-stack": (dict.fromkeys(("a", "b"), family("gemma2", sliding_window=8)), STACK, "bfloat16"),
    "gemma2-old-stack": (
        dict.fromkeys(("a", "b"), family("gemma2", sliding_window=8, dropped=TYPES_KEY)), STACK, "bfloat16"
    ),
    "gemma3-stack": (dict.fromkeys(("a", "b"), family("gemma3_text", sliding_window=8)), STACK, "bfloat16"),
    "gpt2-stack": (dict.fromkeys(("a", "b"), GPT2), STACK, "bfloat16"),
}  # fmt: skip


def run(python: str, command: str, work: object) -> str:
    done = subprocess.run(
        [python, str(SCRIPT), command], input=json.dumps(work), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("version", ["4", "5"])
def test_config_and_tensors_load_alike(catalog: Catalog, tmp_path: Path, version: str) -> None:
    python = transformers_python(version)
    work = [
        [str(tmp_path / case / name), settings | {"seed": seed}]
        for case, (models, _, _) in CASES.items()
        for seed, (name, settings) in enumerate(models.items())
    ]
    run(python, "make", work)
    for case, (_, text, _) in CASES.items():
        merge(catalog, text.format(tmp_path / case), tmp_path / case / "out")
    kinds = {c: "image" if "auto" in models["a"] else "text" for c, (models, _, _) in CASES.items()}
    found = json.loads(run(python, "load", [[str(tmp_path / c / "out"), kinds[c]] for c in CASES]))
    for case, loaded in zip(CASES, found, strict=True):
        expected = {"missing": [], "unexpected": [], "head": True, "embeddings": True}
        expected |= {"dtypes": [f"torch.{CASES[case][2]}"]} | ({"logits": True} if kinds[case] == "text" else {})
        assert loaded == expected, case
