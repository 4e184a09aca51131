"""How well a Llama model predicts text: a small forward pass in NumPy, for models small enough to need no GPU."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.tensor_names import HEAD, is_embeddings
from deltaworks.errors import CheckpointError

Array = NDArray[np.float32]
WINDOW = 256
_BATCH = 8


def load_weights(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Configuration and float32 weights of the Llama model in the folder `path`.

    Raises:
        CheckpointError: it is not a Llama with plain rotary embeddings.
    """
    checkpoint = open_checkpoint(path, ByteCounter())
    config = checkpoint.config
    scaled = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get(
        "rope_type", "default"
    ) != "default"
    if config.get("model_type") != "llama" or config.get("hidden_act") != "silu" or scaled:
        raise CheckpointError(f"{path} is not a plain Llama model; only these can be evaluated here")
    readers = {s.name: RangeReader(path / s.name, ByteCounter()) for s in checkpoint.shards}
    weights = {}
    for tensor in checkpoint.tensors.values():
        raw = np.empty(tensor.nbytes, np.uint8)
        readers[tensor.file].read_into(raw, tensor.offset)
        weights[tensor.name] = decode_reference(raw, tensor.dtype).reshape(tensor.shape)
    for reader in readers.values():
        reader.close()
    return config, weights


def mean_loss(
    config: dict[str, Any], weights: dict[str, Array], tokens: NDArray[np.integer[Any]], windows: int
) -> float:
    """Mean cross-entropy in nats a token over the first `windows` windows of 256 tokens.

    Args:
        config: of the model.
        weights: its tensors, float32.
        tokens: token ids, [n].
        windows: how many windows to use; fewer where the text is shorter.
    """
    count = min(windows, len(tokens) // WINDOW)
    table = tokens[: count * WINDOW].astype(np.int64).reshape(count, WINDOW)
    losses = [_losses(config, weights, table[i : i + _BATCH]) for i in range(0, count, _BATCH)]
    return float(np.concatenate(losses).mean())


def _losses(config: dict[str, Any], weights: dict[str, Array], windows: NDArray[np.int64]) -> Array:
    logits = forward(config, weights, windows[:, :-1])
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    losses: Array = np.log(np.exp(logits).sum(axis=-1)) - chosen
    return losses


def forward(config: dict[str, Any], weights: dict[str, Array], tokens: NDArray[np.int64]) -> Array:
    """Logits of a Llama model, float32, [windows, tokens, vocabulary], for token ids [windows, tokens]."""
    n, t = tokens.shape
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    eps = config["rms_norm_eps"]
    embeddings = next(v for k, v in weights.items() if is_embeddings(k))
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    angles = np.outer(np.arange(t), theta ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    future = np.triu(np.full((t, t), -np.inf, np.float32), 1)

    def norm(x: Array, name: str) -> Array:
        scaled: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weights[name]
        return scaled

    def split(x: Array, count: int) -> Array:
        return x.reshape(n, t, count, size).transpose(0, 2, 1, 3)

    def rotate(x: Array) -> Array:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = embeddings[tokens]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, p + "input_layernorm.weight")
        q = rotate(split(y @ weights[p + "self_attn.q_proj.weight"].T, heads))
        k = rotate(split(y @ weights[p + "self_attn.k_proj.weight"].T, groups))
        v = split(y @ weights[p + "self_attn.v_proj.weight"].T, groups)
        k, v = (np.repeat(a, heads // groups, axis=1) for a in (k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / np.float32(np.sqrt(size)) + future
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        x = x + attended.transpose(0, 2, 1, 3).reshape(n, t, -1) @ weights[p + "self_attn.o_proj.weight"].T
        y = norm(x, p + "post_attention_layernorm.weight")
        gate = y @ weights[p + "mlp.gate_proj.weight"].T
        up = y @ weights[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[p + "mlp.down_proj.weight"].T
    head = next((v for k, v in weights.items() if k.endswith(HEAD)), embeddings)
    logits: Array = norm(x, "model.norm.weight") @ head.T
    return logits
