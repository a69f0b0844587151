"""What the engine says of its KV-cache groups to how they are kept: rows where it says so in full, else whole pages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokendepot.engines.vllm.groups import CANONICAL, OPAQUE, Group, describe_groups
from tokendepot.engines.vllm.settings import RefusedError
from vllm.platforms import current_platform

HEADS, TOKENS, DIM = 8, 16, 128
PAGE = 2 * HEADS * TOKENS * DIM * 2


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)


def described(kind: str = "FullAttentionSpec", layout: str = "auto", tp: int = 1, **changes) -> Group:
    """Of a model with one group, whose spec has `changes`."""
    values = dict(block_size=TOKENS, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16, page_size_bytes=PAGE)
    spec = type(kind, (SimpleNamespace,), {})(**{**values, **changes})
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["model.layers.0.attn", "model.layers.1.attn"])
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS * tp),
    )
    settings = SimpleNamespace(chunk_tokens=256, layout=layout)
    (found,) = describe_groups(config, SimpleNamespace(kv_cache_groups=[group]), settings)
    return found


@pytest.mark.parametrize(
    ("dtype", "page", "row"),
    [(torch.bfloat16, PAGE, 256), (torch.float16, PAGE, 256), (torch.uint8, PAGE // 2, 128), (torch.float8_e4m3fn, PAGE // 2, 128)],
)
def test_dense_rows_of_any_type_are_kept_as_rows(dtype, page: int, row: int) -> None:
    found = described(dtype=dtype, page_size_bytes=page)
    assert (found.kind, found.planes, found.row_bytes, found.heads) == (CANONICAL, 2, row, HEADS)


def test_a_latent_is_one_row_that_every_rank_holds_and_one_stores() -> None:
    found = described("MLAAttentionSpec", tp=2, num_kv_heads=1, head_size=576, page_size_bytes=TOKENS * 576 * 2)
    assert (found.kind, found.planes, found.row_bytes, found.heads) == (CANONICAL, 1, 1152, 1)
    assert found.replicas == 2


NOT_ROWS = {
    "scales within the page": dict(page_size_bytes=PAGE + HEADS * TOKENS * 4),
    "a way of quantizing that is not known": dict(kv_quant_mode=99),
    "more slots for heads than heads": dict(num_head_slots=HEADS + 2),
    "values of another size than keys": dict(head_size_v=DIM // 2),
    "a page padded beyond its rows": dict(page_size_bytes=2 * PAGE),
}


@pytest.mark.parametrize("changes", NOT_ROWS.values(), ids=NOT_ROWS)
def test_what_is_not_dense_rows_is_carried_as_pages_and_never_guessed(changes: dict) -> None:
    found = described(tp=2, **changes)
    assert (found.kind, found.planes, found.row_bytes) == (OPAQUE, 0, 0)
    assert found.page_bytes == changes.get("page_size_bytes", PAGE)
    assert (found.heads, found.rank_heads) == (2, 1), "pages of a rank are that rank's only"
    with pytest.raises(RefusedError, match='has no rows: use "auto" or "opaque"'):
        described(layout="canonical", **changes)


def test_a_latent_that_does_not_divide_into_tokens_is_carried_as_pages() -> None:
    found = described("MLAAttentionSpec", num_kv_heads=1, head_size=576, page_size_bytes=TOKENS * 576 * 2 + 8)
    assert found.kind == OPAQUE


LATENT = dict(num_kv_heads=1, head_size=576, page_size_bytes=TOKENS * 576 * 2)


def test_latents_on_a_cpu_are_not_kept(monkeypatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    with pytest.raises(RefusedError, match="has MLA and runs on a CPU.*: nothing is kept"):
        described("MLAAttentionSpec", **LATENT)
    assert described().kind == OPAQUE, "only latents are refused"


def test_pages_can_be_asked_for() -> None:
    assert described(layout="opaque").kind == OPAQUE


@pytest.mark.parametrize("kind", ["MambaSpec", "ChunkedLocalAttentionSpec", "FullAttentionSpecOfTomorrow"])
def test_attention_of_an_unknown_kind_is_refused_by_its_name(kind: str) -> None:
    with pytest.raises(RefusedError, match=f"KV-cache group 0 is of kind {kind}: only full attention"):
        described(kind)
