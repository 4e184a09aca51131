"""From what a user writes to a folder on this machine."""

import re
from pathlib import Path

from deltaworks.errors import CheckpointError, plain

HUB_ID = re.compile(r"(?:hf://)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "*.spm", "*.tiktoken", "*.txt", "*.codes", "*.py",
    *(f"{name}*" for word in ("license", "licence", "notice", "copying", "use_policy")
      for name in (word, word.upper(), word.capitalize())),
]  # fmt: skip
"""What is fetched of a model: weights, settings, tokenizers, templates, licences, and custom code, which is not run."""


def resolve_source(source: str, relative_to: Path | None = None) -> Path:
    """The local folder of a path or of a hub id ``org/name[@revision]``.

    A folder that exists wins over a hub id. Hub ids go through huggingface_hub and its cache, so `HF_HOME`,
    `HF_HUB_OFFLINE` and tokens work as everywhere; without a network the cached revision is used.

    Args:
        source: what the user wrote.
        relative_to: a second folder to look in, after the working directory.

    Raises:
        CheckpointError: there is no such folder, and no such model in the cache or on the hub.
    """
    if source.startswith("hf://"):
        return _download(source)
    for root in (Path(), relative_to):
        try:
            if root is not None and (folder := root / Path(source).expanduser()).is_dir():
                return folder.resolve()
        except (OSError, RuntimeError) as error:  # a name that is too long, or the home of a user that does not exist
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{plain(source)} cannot be looked up as a model folder: {reason}") from error
    if HUB_ID.fullmatch(source):
        return _download(source)
    raise CheckpointError(
        f"no folder {source!r}; give a model folder, a hub id like org/name@revision, or a registered name"
    )


def _download(source: str) -> Path:
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source!r} is not a hub id; write org/name or org/name@revision")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and rarely needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=FILES)).resolve()
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source!r} is neither a folder here nor in the hub's cache, and it could not be fetched: {reason}"
        ) from error
