"""The small files beside the weights: tokenizer, chat template, generation settings."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from deltaworks.checkpoints.downloads import check_files
from deltaworks.checkpoints.json_files import read_json
from deltaworks.checkpoints.own_files import copy_own_file, own_file
from deltaworks.documents import read_text
from deltaworks.errors import CheckpointError, quoted

PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.model",
    "*.spm",
    "bpe.codes",
    "tekken.json",
    "*.tiktoken",
)
"""What a model needs beside its weights and `config.json`; custom code, which is another matter, may look like it."""

_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-].*)?", re.IGNORECASE)
_CODE = (".py", ".pyc")


def sidecar_names(source: Path) -> list[str]:
    """Names of the files that a model folder needs beside its weights and `config.json`, relative to it and sorted.

    Raises:
        CheckpointError: one of them is not a file of the model, or a pointer to it; see `own_file` and `check_file`.
    """
    found = {p.relative_to(source).as_posix() for pattern in PATTERNS for p in source.glob(pattern)}
    found |= {p.name for p in source.iterdir() if _LICENCE.fullmatch(p.name)} if source.is_dir() else set()
    names = sorted(
        name
        for name in found
        if not name.endswith(_CODE) and ((source / name).is_symlink() or not (source / name).is_dir())
    )
    check_files(source, names)
    return names


def copy_sidecars(source: Path, target: Path) -> dict[str, str]:
    """Copy the files a model needs beside its weights and `config.json`, and flush them.

    Returns:
        The BLAKE3 of each, in hex, by its name.

    Raises:
        CheckpointError: one of them is not a file of the model, or cannot be read; see `own_file`.
        OSError: a copy cannot be written.
    """
    return copy_files(source, target, sidecar_names(source))


def copy_files(source: Path, target: Path, names: Iterable[str]) -> dict[str, str]:
    """Copy some files of a model folder, given by their names in it, as `copy_sidecars` does."""
    digests = {}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        digests[name] = copy_own_file(source / name, target / name, source)
    return digests


def vocabulary(path: Path) -> dict[str, int] | None:
    """Token to id of the fast tokenizer in a model folder; None where there is none to read.

    Raises:
        CheckpointError: its tokenizer.json is not what a tokenizer is; the message says where.
    """
    file = path / "tokenizer.json"
    if own_file(file) is None:
        return None
    content = read_json(file)
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        tokens = {name: _token_id(number, file, "model.vocab", name) for name, number in vocab.items()}
    elif isinstance(vocab, list):
        tokens = {_token(entry, file, i): i for i, entry in enumerate(vocab)}
    else:
        where, found = ("model", model) if not isinstance(model, dict) else ("model.vocab", vocab)
        raise CheckpointError(f"{file}: {where}: expected the tokens, not {quoted(found)}; fetch the tokenizer again")
    if not isinstance(added, list | None):
        raise CheckpointError(f"{file}: added_tokens: expected a list, not {quoted(added)}; fetch the tokenizer again")
    for i, entry in enumerate(added or ()):
        name, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str):
            raise CheckpointError(
                f"{file}: added_tokens[{i}]: expected a token with content and id, not {quoted(entry)};"
                " fetch the tokenizer again"
            )
        tokens[name] = _token_id(number, file, "added_tokens", i)
    return tokens


def _token_id(number: object, file: Path, where: str, key: str | int) -> int:
    if type(number) is not int or number < 0:
        raise CheckpointError(
            f"{file}: {where}[{quoted(key, 60)}]: expected a token's number, not {quoted(number)};"
            " fetch the tokenizer again"
        )
    return number


def _token(entry: object, file: Path, i: int) -> str:
    """The token of an entry of a Unigram vocabulary: a pair of token and score."""
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        raise CheckpointError(
            f"{file}: model.vocab[{i}]: expected a token and its score, not {quoted(entry)}; fetch the tokenizer again"
        )
    return entry[0]


def chat_template(path: Path) -> str | None:
    """The chat template of a model folder, from its own file or from the tokenizer's configuration.

    Raises:
        CheckpointError: the file is not text in UTF-8, or no file of the model.
    """
    file = path / "chat_template.jinja"
    if own_file(file) is not None:
        return read_text(file, "a chat template", CheckpointError)
    file = path / "tokenizer_config.json"
    template = None if own_file(file) is None else read_json(file).get("chat_template")
    return template if isinstance(template, str) else None


def write_chat_template(path: Path, template: str) -> None:
    """Make `template` the one chat template of the model folder at `path`."""
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (path / "chat_template.json").unlink(missing_ok=True)
    config = read_json(path / "tokenizer_config.json", missing_ok=True)
    if config.pop("chat_template", None) is not None:
        write_json(path / "tokenizer_config.json", config)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
