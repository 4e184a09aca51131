#!/usr/bin/env python3
"""Train the micro family: one small Llama base and five experts, each fine-tuned on one domain.

    python examples/train_micro_family.py            # writes examples/micro, about half an hour on two cores

The text is what a Debian machine has: Python's standard library, C headers, Perl modules, licence texts and
manual pages. The base learns from a mixture of all five; each expert is a full fine-tune of the base on one.
Every model is a complete Hugging Face folder (Llama architecture, tied embeddings, bf16, three shards).
`eval/<domain>.npy` is held-out text as uint16 token ids.

Needs torch, tokenizers and safetensors; nothing else in deltaworks does.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 1024,
}
WINDOW = 256
SHARDS = 3
HELD_OUT_TOKENS = 16_384
FILE_LIMIT = 60_000  # bytes of one file, so that no single long file is a domain
HELD_OUT_FILE_LIMIT = 3_000


def read_text(path: str) -> str:
    opener: Callable[..., object] = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as f:  # type: ignore[attr-defined]
            return str(f.read(FILE_LIMIT).decode("utf-8", errors="ignore"))
    except (OSError, EOFError):
        return ""


def find_files(*patterns: str) -> Iterator[str]:
    for pattern in patterns:
        yield from glob.iglob(pattern, recursive=True)


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "python": lambda: (
        f
        for f in find_files(f"{sysconfig.get_path('stdlib')}/**/*.py")
        if "site-packages" not in f and "/test" not in f
    ),
    "c": lambda: find_files("/usr/include/*.h", "/usr/include/linux/**/*.h", "/usr/include/*-linux-gnu/**/*.h"),
    "perl": lambda: find_files("/usr/share/perl/**/*.p[ml]", "/usr/share/perl5/**/*.p[ml]"),
    "licences": lambda: find_files("/usr/share/common-licenses/*", "/usr/share/doc/*/copyright"),
    "manpages": lambda: (f for f in find_files("/usr/share/man/man[1-8]/*.gz") if "/gcloud" not in f),
}


def load_domain(name: str, limit: int) -> tuple[str, str]:
    """Training and held-out text of a domain; a file goes whole to one side, chosen by the hash of its text."""
    train, held = [], []
    size = 0
    seen: set[bytes] = set()
    for path in sorted(set(DOMAINS[name]()), key=lambda p: hashlib.sha256(p.encode()).digest()):
        text = read_text(path)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 400 or digest in seen:
            continue
        seen.add(digest)
        if digest[0] < 20:
            held.append(text[:HELD_OUT_FILE_LIMIT])
        else:
            train.append(text)
        size += len(text)
        if size > limit:
            break
    if not train or not held:
        raise SystemExit(f"domain {name}: no text found on this machine; install it or remove the domain from DOMAINS")
    return "\n".join(train), "\n".join(held)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Llama(torch.nn.Module):
    """A plain Llama whose parameters carry the names of the Hugging Face layout."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        c = CONFIG
        h, d = c["hidden_size"], c["head_dim"]
        kv, inter = c["num_key_value_heads"] * d, c["intermediate_size"]
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape).normal_(0, c["initializer_range"], generator=generator))

        named = {"model.embed_tokens.weight": weight(c["vocab_size"], h)}
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            named[p + "input_layernorm.weight"] = torch.nn.Parameter(torch.ones(h))
            named[p + "self_attn.q_proj.weight"] = weight(h, h)
            named[p + "self_attn.k_proj.weight"] = weight(kv, h)
            named[p + "self_attn.v_proj.weight"] = weight(kv, h)
            named[p + "self_attn.o_proj.weight"] = weight(h, h)
            named[p + "post_attention_layernorm.weight"] = torch.nn.Parameter(torch.ones(h))
            named[p + "mlp.gate_proj.weight"] = weight(inter, h)
            named[p + "mlp.up_proj.weight"] = weight(inter, h)
            named[p + "mlp.down_proj.weight"] = weight(h, inter)
        named["model.norm.weight"] = torch.nn.Parameter(torch.ones(h))
        self.named = named
        self.table = torch.nn.ParameterList(named.values())
        angles = torch.outer(torch.arange(WINDOW).float(), 1.0 / c["rope_theta"] ** (torch.arange(0, d, 2) / d))
        self.cos, self.sin = angles.cos(), angles.sin()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.named[name], CONFIG["rms_norm_eps"])

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        c, w = CONFIG, self.named
        n, t = tokens.shape
        x = F.embedding(tokens, w["model.embed_tokens.weight"])
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            y = self.norm(x, p + "input_layernorm.weight")
            q, k, v = (
                F.linear(y, w[f"{p}self_attn.{s}_proj.weight"]).view(n, t, -1, c["head_dim"]).transpose(1, 2)
                for s in "qkv"
            )
            attended = F.scaled_dot_product_attention(
                self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True
            )
            x = x + F.linear(attended.transpose(1, 2).reshape(n, t, -1), w[p + "self_attn.o_proj.weight"])
            y = self.norm(x, p + "post_attention_layernorm.weight")
            gate, up = F.linear(y, w[p + "mlp.gate_proj.weight"]), F.linear(y, w[p + "mlp.up_proj.weight"])
            x = x + F.linear(F.silu(gate) * up, w[p + "mlp.down_proj.weight"])
        return F.linear(self.norm(x, "model.norm.weight"), w["model.embed_tokens.weight"])

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def fit(model: Llama, sample: Callable[[], torch.Tensor], steps: int, rate: float, label: str) -> None:
    """AdamW with warm-up and cosine decay to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * progress))
        loss = model.loss(sample())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{label}: step {step}/{steps} loss {loss.item():.3f} {time.time() - started:.0f}s", flush=True)


def write_model(model: Llama, folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named.items()}
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(SHARDS - 1, written * SHARDS // total)][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    files = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "micro")
    parser.add_argument("--base-steps", type=int, default=1100)
    parser.add_argument("--expert-steps", type=int, default=400)
    parser.add_argument("--expert-rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts = {name: load_domain(name, 12_000_000) for name in DOMAINS}
    tokenizer = train_tokenizer([train[:1_000_000] for train, _ in texts.values()])
    train, held = {}, {}
    (args.out / "eval").mkdir(parents=True, exist_ok=True)
    for name, (train_text, held_text) in texts.items():
        train[name] = torch.tensor(tokenizer.encode(train_text[:9_000_000]).ids)
        ids = np.array(tokenizer.encode(held_text[:400_000]).ids[:HELD_OUT_TOKENS], dtype=np.uint16)
        np.save(args.out / "eval" / f"{name}.npy", ids)
        held[name] = torch.from_numpy(ids.astype(np.int64)).unfold(0, WINDOW, WINDOW)
        print(f"{name}: {len(train[name]):,} training tokens, {len(ids):,} held out", flush=True)

    generator = torch.Generator().manual_seed(args.seed)

    def windows(name: str, count: int) -> torch.Tensor:
        data = train[name]
        starts = torch.randint(0, len(data) - WINDOW, (count,), generator=generator)
        return torch.stack([data[s : s + WINDOW] for s in starts.tolist()])

    def mixture() -> torch.Tensor:
        return torch.cat([windows(name, max(1, args.batch // len(DOMAINS))) for name in DOMAINS])

    def losses(model: Llama) -> dict[str, float]:
        with torch.no_grad():
            return {name: model.loss(w).item() for name, w in held.items()}

    report = {}
    base = Llama(args.seed)
    fit(base, mixture, args.base_steps, 3e-3, "base")
    write_model(base, args.out / "base", tokenizer)
    # What ships is bf16, so the experts start from exactly what ships.
    start = {k: v.detach().to(torch.bfloat16).float() for k, v in base.named.items()}
    report["base"] = losses(base)
    experts: dict[str, dict[str, torch.Tensor]] = {}
    print("base", report["base"], flush=True)
    for name in DOMAINS:
        expert = Llama(args.seed)
        for key, parameter in expert.named.items():
            parameter.data.copy_(start[key])
        fit(expert, lambda name=name: windows(name, args.batch), args.expert_steps, args.expert_rate, name)
        write_model(expert, args.out / name, tokenizer)
        experts[name] = {k: v.detach() for k, v in expert.named.items()}
        report[name] = losses(expert)
        print(name, report[name], flush=True)
    # Not written: a look at what averaging the experts gives, to see that the family is worth merging.
    for weight in (1 / len(DOMAINS), 0.35):
        merged = Llama(args.seed)
        for key, parameter in merged.named.items():
            deltas = [experts[name][key] - start[key] for name in DOMAINS]
            parameter.data.copy_(start[key] + weight * torch.stack(deltas).sum(0))
        found = losses(merged)
        print(f"task arithmetic, weight {weight:.2f}: mean {sum(found.values()) / len(found):.4f}", found)
    (args.out / "losses.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
