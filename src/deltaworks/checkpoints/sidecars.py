"""The small files beside the weights: tokenizer, chat template, generation settings."""

import json
from pathlib import Path
from typing import Any

from deltaworks.checkpoints.checkpoint import read_json
from deltaworks.checkpoints.own_files import copy_own_file, own_file

PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "spiece.model",
    "*.tiktoken",
)


def sidecar_names(source: Path) -> list[str]:
    """Names of the files that a model folder needs beside its weights and `config.json`, sorted.

    Raises:
        CheckpointError: one of them is no file of the model; see `own_file`.
    """
    found = {p.name for pattern in PATTERNS for p in source.glob(pattern)}
    names = sorted(name for name in found if (source / name).is_symlink() or not (source / name).is_dir())
    for name in names:
        own_file(source / name)
    return names


def copy_sidecars(source: Path, target: Path) -> dict[str, str]:
    """Copy the files a model needs beside its weights and `config.json`, and flush them.

    Returns:
        The BLAKE3 of each, in hex, by its name.

    Raises:
        CheckpointError: one of them is no file of the model, or cannot be read; see `own_file`.
        OSError: a copy cannot be written.
    """
    return {name: copy_own_file(source / name, target / name) for name in sidecar_names(source)}


def vocabulary(path: Path) -> dict[str, int] | None:
    """Token to id of the fast tokenizer in a model folder; None where there is none to read."""
    if own_file(path / "tokenizer.json") is None:
        return None
    content = read_json(path / "tokenizer.json")
    vocab = content.get("model", {}).get("vocab", {})
    tokens = (
        {str(k): int(v) for k, v in vocab.items()}
        if isinstance(vocab, dict)
        else {str(e[0]): i for i, e in enumerate(vocab)}
    )
    tokens |= {str(t["content"]): int(t["id"]) for t in content.get("added_tokens", [])}
    return tokens


def chat_template(path: Path) -> str | None:
    """The chat template of a model folder, from its own file or from the tokenizer's configuration."""
    if (file := own_file(path / "chat_template.jinja")) is not None:
        return file.read_text(encoding="utf-8")
    own_file(path / "tokenizer_config.json")
    template = read_json(path / "tokenizer_config.json", missing_ok=True).get("chat_template")
    return template if isinstance(template, str) else None


def write_chat_template(path: Path, template: str) -> None:
    """Make `template` the one chat template of the model folder at `path`."""
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (path / "chat_template.json").unlink(missing_ok=True)
    config = read_json(path / "tokenizer_config.json", missing_ok=True)
    if config.pop("chat_template", None) is not None:
        write_json(path / "tokenizer_config.json", config)


def output_config(config: dict[str, Any], torch_dtype: str, layers: int | None, *, untie: bool) -> dict[str, Any]:
    """`config.json` of a merged model.

    Args:
        config: the base model's.
        torch_dtype: the element type written.
        layers: the number of layers, where it was changed.
        untie: the output carries an `lm_head` of its own though the base ties it to the embeddings.
    """
    result = dict(config)
    for key in ("dtype", "torch_dtype"):
        if key in result:
            result[key] = torch_dtype
    if "dtype" not in result:
        result["torch_dtype"] = torch_dtype
    if layers is not None:
        result["num_hidden_layers"] = layers
    if untie:
        result["tie_word_embeddings"] = False
    return result


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
