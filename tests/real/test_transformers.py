"""What we write is what transformers reads; it lives in the peers' environment."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from families import MICRO
from merges import merge
from peers import mergekit_python

from deltaworks.catalog.store import Catalog
from deltaworks.merging.prepare import MergeOptions
from deltaworks.reports.demo import family_recipe
from deltaworks.reports.loss import load_weights, mean_loss

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (MICRO / "base").is_dir(), reason="the micro family is not in this checkout"),
]

SCRIPT = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, text = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path)
start = tokenizer("def main(", return_tensors="pt")
out = model.generate(**start, max_new_tokens=12, do_sample=False)
windows = torch.from_numpy(np.load(text).astype(np.int64)).unfold(0, 256, 256)[:8]
with torch.no_grad():
    logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
print(json.dumps({"tokens": out.shape[1] - start["input_ids"].shape[1], "text": tokenizer.decode(out[0]),
                  "loss": loss, "missing": list(info["missing_keys"]), "unexpected": list(info["unexpected_keys"])}))
"""


@pytest.mark.parametrize("shards", ["one", "many"])
def test_a_merge_loads_and_generates(catalog: Catalog, tmp_path: Path, shards: str) -> None:
    python = mergekit_python()
    experts = sorted(p.name for p in MICRO.iterdir() if (p / "config.json").is_file() and p.name != "base")
    text = family_recipe(MICRO, experts, "ties", "weight: 1, density: 0.5, lambda: 0.35")
    merge(catalog, text, tmp_path / "out", MergeOptions(shard_bytes=10**9 if shards == "one" else 200_000))
    evaluation = MICRO / "eval" / "python.npy"
    done = subprocess.run(
        [python, "-c", SCRIPT, str(tmp_path / "out"), str(evaluation)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["missing"] == found["unexpected"] == []
    assert found["tokens"] >= 1
    assert found["text"].startswith("def main(")
    config, weights = load_weights(tmp_path / "out")
    ours = mean_loss(config, weights, np.load(evaluation), 8)
    assert ours == pytest.approx(found["loss"], rel=1e-5), "the small NumPy forward pass is transformers' own"
