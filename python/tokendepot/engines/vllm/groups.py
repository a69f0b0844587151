"""What both halves must agree on about the KV-cache groups of a model: the only place that derives it.

The scheduler half looks up and promises by these values, the worker halves cut and store extents by them. Both call
describe_groups() with the same arguments, so they cannot drift apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokendepot import _core
from tokendepot.engines.vllm import versions
from tokendepot.engines.vllm.settings import RefusedError, Settings

FULL, WINDOW = "full", "window"
CANONICAL, OPAQUE = "canonical", "opaque"
PLAIN_QUANT_MODES = (0, 1)  # none, and fp8 with per-tensor scales: rows are dense


@dataclass(frozen=True)
class Placement:
    """Where a rank stands in the parallel arrangement."""

    tp_size: int
    pp_size: int
    rank: int = 0

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size


@dataclass(frozen=True)
class Group:
    """One KV-cache group, in the depot's terms."""

    index: int
    attention: str  # FULL or WINDOW
    window: int  # tokens that a query may see, itself included; 0 for FULL
    block_tokens: int
    chunk_tokens: int
    stored_tokens: int  # tokens kept of each chunk: its last ones
    kind: str  # CANONICAL or OPAQUE
    planes: int
    row_bytes: int  # one head's row of one token in one plane
    page_bytes: int  # what the engine counts for one block of one layer
    heads: int  # over all ranks; for OPAQUE the number of distinct writers beside each other
    rank_heads: int  # heads that one rank holds
    replicas: int  # ranks that hold the same heads
    head_size: int
    layer_names: tuple[str, ...]  # of this rank, in layer order
    layers: int  # over all ranks

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_tokens // self.block_tokens

    @property
    def stored_blocks(self) -> int:
        return self.stored_tokens // self.block_tokens

    @property
    def window_chunks(self) -> int:
        """Chunks before a boundary that this group needs; 0 = all of them."""
        if self.attention == FULL:
            return 0
        return max(1, -(-(self.window - 1) // self.chunk_tokens))

    def want(self) -> _core.GroupWant:
        return _core.GroupWant(
            self.index, self.kind, (0, self.layers, 0, self.heads), self.stored_tokens, self.window_chunks
        )

    def part(self, placement: Placement) -> tuple[int, int, int, int]:
        """The rectangle that this rank holds: (layer begin, layer end, head begin, head end)."""
        first_layer, last_layer = layer_range(self.layers, placement)
        first_head = placement.tp_rank // self.replicas * self.rank_heads
        return first_layer, last_layer, first_head, first_head + self.rank_heads

    def stores(self, placement: Placement) -> bool:
        """One of the ranks that hold the same heads stores them."""
        return placement.tp_rank % self.replicas == 0


def describe_groups(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> list[Group]:
    """Raises RefusedError in one sentence when the model has anything that is not understood."""
    _check_model(vllm_config)
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    if not groups:
        raise RefusedError("the model has no KV-cache group, so there is nothing to keep")
    parallel = vllm_config.parallel_config
    placement = Placement(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    if placement.pp_size > 1 and len(groups) > 1:
        raise RefusedError(
            f"pipeline_parallel_size is {placement.pp_size} and the model has {len(groups)} KV-cache groups: "
            "several groups are kept with pipeline_parallel_size 1 only"
        )
    # vLLM's rotary kernel for CPUs (0.32) mixes up tokens of MLA's strided keys, so KV depends on what else is computed with
    # it: hits of CPU_MLA and AMX_MLA gave other text than a cold prefill, and so did vLLM's own prefix cache.
    if any(is_mla(group.kv_cache_spec) for group in groups) and _on_a_cpu():
        raise RefusedError(
            "the model has MLA and runs on a CPU, where vLLM's text depends on how much of a prompt is computed at once: "
            "nothing is kept for this model"
        )
    return [_describe(index, group, vllm_config, placement, settings) for index, group in enumerate(groups)]


def _check_model(vllm_config: Any) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise RefusedError(f"{name} is {getattr(parallel, name)} but KV is kept for {name} 1 only")
    if getattr(cache, "calculate_kv_scales", False):
        raise RefusedError("calculate_kv_scales is on: KV scales that change at run time cannot be kept")


def _describe(index: int, group: Any, vllm_config: Any, placement: Placement, settings: Settings) -> Group:
    spec = group.kv_cache_spec
    attention, window = _attention(index, group, spec)
    block, chunk = int(spec.block_size), settings.chunk_tokens
    if chunk % block:
        raise RefusedError(
            f"chunk_tokens is {chunk} but must be a multiple of the block size {block} of KV-cache group "
            f"{index}"
        )
    stored = min(chunk, -(-(window - 1) // block) * block) if window else chunk
    kind, planes, row_bytes = _layout(spec, settings)
    heads, rank_heads, replicas = _heads(spec, vllm_config, placement, kind)
    return Group(
        index=index,
        attention=attention,
        window=window,
        block_tokens=block,
        chunk_tokens=chunk,
        stored_tokens=stored,
        kind=kind,
        planes=planes,
        row_bytes=row_bytes,
        page_bytes=int(spec.page_size_bytes),
        heads=heads,
        rank_heads=rank_heads,
        replicas=replicas,
        head_size=int(spec.head_size),
        layer_names=tuple(sorted(group.layer_names, key=layer_order)),
        layers=_layer_count(group, vllm_config, placement),
    )


def _attention(index: int, group: Any, spec: Any) -> tuple[str, int]:
    """(FULL | WINDOW, window). Classes are taken by exact name: a subclass may keep its cells in another way."""
    name = type(spec).__name__
    problem = ""
    if name not in ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec"):
        problem = f"is of kind {name}"
    elif not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
        problem = "is marked by the engine as not transferable"
    elif getattr(spec, "compress_ratio", 1) != 1 or getattr(spec, "tokens_per_state", 1) != 1:
        problem = "does not hold one state for each token"
    elif getattr(spec, "non_causal", False):
        problem = "is not causal"
    if problem:
        raise RefusedError(
            f"KV-cache group {index} {problem}: only full attention, sliding windows and MLA are kept, so "
            "nothing is kept "
            "for this model"
        )
    if name == "SlidingWindowSpec":
        return WINDOW, max(2, int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0) or 0))
    return FULL, 0


def _on_a_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def is_mla(spec: Any) -> bool:
    return type(spec).__name__ == "MLAAttentionSpec"


def _layout(spec: Any, settings: Settings) -> tuple[str, int, int]:
    """(kind, planes, row bytes); opaque groups have no rows."""
    kind = settings.layout
    if kind == "auto":
        kind = OPAQUE if _on_a_cpu() else CANONICAL
    if kind == OPAQUE:
        return OPAQUE, 0, 0
    row = _row_bytes(spec)
    if row is None:
        if settings.layout == CANONICAL:
            raise RefusedError(
                f'"layout" is "canonical" but this KV cache ({type(spec).__name__}, {spec.dtype}) is packed '
                "in a way that "
                'has no rows: use "auto" or "opaque"'
            )
        return OPAQUE, 0, 0
    return CANONICAL, 1 if is_mla(spec) else 2, row


def _row_bytes(spec: Any) -> int | None:
    """Bytes of one head's row in one plane, or None when the page is not dense rows."""
    heads, tokens = int(spec.num_kv_heads), int(spec.block_size)
    page = int(getattr(spec, "real_page_size_bytes", spec.page_size_bytes))
    if is_mla(spec):
        return page // tokens if heads == 1 and page % tokens == 0 else None
    if int(getattr(spec, "kv_quant_mode", 0) or 0) not in PLAIN_QUANT_MODES:
        return None
    if getattr(spec, "num_head_slots", None) not in (None, heads):
        return None
    if (getattr(spec, "head_size_v", None) or spec.head_size) != spec.head_size:
        return None
    row = int(spec.head_size) * spec.dtype.itemsize
    return row if page == 2 * heads * tokens * row else None


def _heads(spec: Any, vllm_config: Any, placement: Placement, kind: str) -> tuple[int, int, int]:
    """(heads over all ranks, heads of one rank, ranks that hold the same heads)."""
    tp, mine = placement.tp_size, int(spec.num_kv_heads)
    if is_mla(spec):
        return 1, 1, tp  # every rank holds the same latent
    if kind == OPAQUE:
        return tp, 1, 1  # one writer beside the other
    if tp == 1:
        return mine, mine, 1
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    if total >= tp and total % tp == 0 and mine == total // tp:
        return total, mine, 1
    if total < tp and tp % total == 0 and mine == 1:
        return total, 1, tp // total
    raise RefusedError(
        f"a rank holds {mine} KV heads of a group while the model has {total} over {tp} ranks: such a split "
        "cannot be kept "
        'in the canonical layout, use "layout": "opaque"'
    )


def layer_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 10 behind layer 2."""
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in re.split(r"(\d+)", name)]


def layer_number(name: str) -> int:
    """First number in a layer's name, -1 when it has none."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else -1


def layer_range(layers: int, placement: Placement) -> tuple[int, int]:
    """Layers [begin, end) of a rank, as vLLM splits them over the pipeline."""
    if placement.pp_size == 1:
        return 0, layers
    from vllm.distributed.utils import get_pp_indices

    begin, end = get_pp_indices(layers, placement.pp_rank, placement.pp_size)
    return begin, end


def _layer_count(group: Any, vllm_config: Any, placement: Placement) -> int:
    if placement.pp_size == 1:
        return len(group.layer_names)
    total = int(vllm_config.model_config.hf_text_config.num_hidden_layers)
    numbers = sorted(layer_number(name) for name in group.layer_names)
    ranges = [
        list(range(*layer_range(total, Placement(1, placement.pp_size, pp))))
        for pp in range(placement.pp_size)
    ]
    if numbers not in ranges:
        raise RefusedError(
            f"a rank of pipeline_parallel_size {placement.pp_size} holds the layers {numbers}, which is no "
            "share of "
            f"{total} layers: such a split cannot be kept"
        )
    return total


def loads_are_safe(groups: list[Group]) -> bool:
    """False when a failed load would kill this engine: then nothing may be promised (see versions)."""
    return len(groups) == 1 or versions.REQUEST_LEVEL_FAILURES
