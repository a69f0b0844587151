"""The model and the prompts: Llama-3.1-8B's shape with random weights whose answers depend on every KV cell."""

from __future__ import annotations

import json
import random
from pathlib import Path

CONTEXTS = (50, 1000, 2000, 8000, 16_000, 24_000, 32_000, 64_000, 96_000, 128_000)
TOKEN_BYTES = 131_072  # K and V, 32 layers, 8 heads, 128 values of 2 bytes
CHUNK = 256
TAIL = 20  # new tokens behind a context that was seen before
SHAPE = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    rope_theta=500000.0,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    bos_token_id=128000,
    eos_token_id=128001,
)


def write_model(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    return str(directory)


def repetitions(context: int) -> int:
    return 3 if context <= 2000 else 1


def prompt(context: int, repetition: int) -> list[int]:
    return random.Random(f"prompt {context} {repetition}").choices(range(1000, 127_000), k=context)


def tail(context: int, repetition: int, which: int) -> list[int]:
    return random.Random(f"tail {context} {repetition} {which}").choices(range(1000, 127_000), k=TAIL)


def spread_weights(model) -> int:
    """Runs in the worker: dummy weights of vLLM answer the same whatever the KV cache holds; these do not."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(20261124)
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            if "norm" in name:
                weights.fill_(1.0)
            elif weights.dim() == 2:
                spread = 1.0 if "embed" in name else (2.0 if "qkv" in name else 1.0) / weights.shape[1] ** 0.5
                weights.normal_(0.0, spread, generator=generator)
    torch.cuda.synchronize()
    return sum(1 for _ in model.parameters())
