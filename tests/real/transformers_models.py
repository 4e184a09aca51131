"""Runs inside an environment with transformers: writes small models, and loads merged ones.

`make` writes a model folder for every [folder, configuration] read from standard input. `load` loads every folder and
prints what was loaded: whether its head and its logits are those that the tensors of its files give.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
AUTO = {"text": transformers.AutoModelForCausalLM, "image": transformers.AutoModelForImageTextToText}


def make(folder: str, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    auto, seed, dropped = AUTO[settings.pop("auto", "text")], settings.pop("seed"), settings.pop("dropped", [])
    torch.manual_seed(seed)
    model = auto.from_config(transformers.AutoConfig.for_model(**settings)).to(torch.bfloat16)
    model.save_pretrained(folder)
    file = Path(folder, "config.json")
    config = json.loads(file.read_text())
    for key in dropped:
        config.pop(key, None)
    file.write_text(json.dumps(config))


def load(folder: str, kind: str) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(shard)
    model, info = AUTO[kind].from_pretrained(folder, output_loading_info=True, torch_dtype="auto")
    embeddings = next(t for n, t in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight")))
    head = next((t for n, t in tensors.items() if n.endswith("lm_head.weight")), embeddings)
    found: dict[str, Any] = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "head": bool(torch.equal(model.get_output_embeddings().weight, head)),
        "embeddings": bool(torch.equal(model.get_input_embeddings().weight, embeddings)),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()} | {str(model.dtype)}),
    }
    if kind == "text":
        found["logits"] = _logits_agree(model, folder, tensors, head)
    return found


def _logits_agree(model: Any, folder: str, tensors: dict[str, torch.Tensor], head: torch.Tensor) -> bool:
    """Compare with a model whose parameters are set from the tensors one by one, its head apart from its embeddings."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    by_hand = AUTO["text"].from_config(config)
    parameters = dict(by_hand.named_parameters())
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            # Buffers keep their element type, as they do in a model that is loaded.
            parameter.data = head if name == "lm_head.weight" else tensors[name]
        ids = torch.arange(1, 41)[None] % 60
        ours, theirs = (m.eval()(ids).logits for m in (model, by_hand))
    return bool(torch.equal(ours, theirs)) and bool(ours.float().std() > 0)


if __name__ == "__main__":
    work = json.load(sys.stdin)
    if sys.argv[1] == "make":
        for item in work:
            make(*item)
    else:
        print(json.dumps([load(*item) for item in work]))
