"""Tiny models for tests, made on the spot: nothing is downloaded.

usage: tiny_model.py DIRECTORY llama|gemma3|deepseek2

The weights are random, wide enough (standard deviation 0.08, untied head) that greedy text depends on the whole prefix;
vLLM's own dummy weights repeat two tokens whatever the KV cache holds.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SIZES = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def write_configuration(directory: str | Path) -> str:
    """A model that can be configured but not computed: for the harness, whose fake model needs no weights."""
    path = Path(directory)
    path.mkdir(parents=True)
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=4,
        rms_norm_eps=1e-6,
        torch_dtype="float32",
        **SIZES,
    )
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(random.Random(1).randbytes(1 << 16))
    return str(path)


def write_checkpoint(directory: str | Path, kind: str) -> str:
    """A checkpoint that vLLM can run: "llama" has one KV-cache group, "gemma3" full and sliding-window groups, "deepseek2"
    one group of MLA."""
    import torch
    import transformers

    torch.manual_seed(1)
    common = dict(initializer_range=0.08, **SIZES)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=4, **common))
    elif kind == "gemma3":
        layers = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(6)]
        model = transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                num_hidden_layers=6,
                sliding_window=128,
                query_pre_attn_scalar=64,
                layer_types=layers,
                **common,
            )
        )
    else:
        # Kernels of MLA take the sizes of DeepSeek's heads and no others. All layers come before those with experts.
        model = transformers.DeepseekV2ForCausalLM(
            transformers.DeepseekV2Config(
                num_hidden_layers=4,
                first_k_dense_replace=4,
                q_lora_rank=None,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                **{**common, "num_key_value_heads": SIZES["num_attention_heads"]},
            )
        )
    model.float().save_pretrained(directory)
    return str(directory)


if __name__ == "__main__":
    print(write_checkpoint(sys.argv[1], sys.argv[2]))
