"""What vLLM's attention on a CPU makes of a token when its scratch memory holds NaN: prints how many of ROUNDS are wrong.

A layer with a window whose metadata were made without one, as in a group that it shares with layers without a window.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops, envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

ROUNDS = 20
BLOCKS, BLOCK, KV_HEADS, HEADS, HEAD, WINDOW = 128, 32, 2, 8, 64, 256
ISA = _get_attn_isa(torch.float32, BLOCK, HEAD)


def halves(cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return cache.view(BLOCKS, KV_HEADS, 2 * BLOCK, HEAD).chunk(2, dim=2)


def attend(query: torch.Tensor, tokens: int, cache: torch.Tensor, window: int, split: bool) -> torch.Tensor:
    starts = torch.tensor([0, len(query)], dtype=torch.int32)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD, seq_lens=lengths, dtype=torch.float32,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa=ISA, enable_kv_split=split,
    )  # fmt: skip
    out = torch.zeros(len(query), HEADS, HEAD)
    table = torch.arange(BLOCKS, dtype=torch.int32).view(1, -1)
    _custom_ops.cpu_attention_with_kv_cache(
        query, *halves(cache), out, starts, lengths, HEAD**-0.5, True, None, window, table, 0.0, metadata, None
    )
    return out


def by_hand(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    grouped = query.view(KV_HEADS, HEADS // KV_HEADS, HEAD)
    weights = torch.softmax(grouped @ keys[-WINDOW:].permute(1, 2, 0) * HEAD**-0.5, dim=-1)
    return (weights @ values[-WINDOW:].transpose(0, 1)).reshape(1, HEADS, HEAD)


def main() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(2)
    keys, values = torch.randn(2, BLOCKS * BLOCK, KV_HEADS, HEAD)
    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD)
    _custom_ops.cpu_attn_reshape_and_cache(keys, values, *halves(cache), torch.arange(BLOCKS * BLOCK), ISA)
    poison = torch.full_like(cache, float("nan"))
    wrong = 0
    for tokens in range(2000, 2000 + ROUNDS):
        for rows in (1, 64):
            attend(torch.randn(rows, HEADS, HEAD), tokens, poison, -1, True)
        query = torch.randn(1, HEADS, HEAD)
        out = attend(query, tokens, cache, WINDOW, envs.VLLM_CPU_ATTN_SPLIT_KV)
        wrong += not torch.allclose(out, by_hand(query, keys[:tokens], values[:tokens]), atol=1e-4)
    print(f"{wrong} of {ROUNDS} wrong")


if __name__ == "__main__":
    main()
