"""Sizes of KV caches: known models, config.json files, tensor-parallel cuts, and what a prefill costs."""

import json

import pytest

from tokendepot.bench.shapes import (
    SHAPES,
    ShapeError,
    bytes_per_token,
    extent_bytes,
    loaded_bytes,
    prefill_flops,
    shape_of,
)

MIB = 1 << 20

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    "name, dtype, size",
    [
        ("llama-3.1-8b", "bf16", 131_072),
        ("llama-3.1-70b", "bf16", 327_680),
        ("llama-3.1-70b", "fp8", 163_840),
        ("llama-3.1-405b", "bf16", 516_096),
        ("qwen3-32b", "bf16", 262_144),
        ("deepseek-v3", "bf16", 70_272),
        ("gpt-oss-120b", "bf16", 73_728),
        ("gemma-3-27b", "bf16", 507_904),
    ],
)
def test_a_token_takes_what_the_model_s_shape_says(name, dtype, size):
    assert bytes_per_token(shape_of(name), dtype) == size


def test_a_chunk_of_the_70b_is_80_mib_and_a_rank_of_eight_holds_10():
    shape = shape_of("Llama-3.1-70B")
    assert extent_bytes(shape, 256) == 80 * MIB
    assert extent_bytes(shape, 256, tp=8) == 10 * MIB
    assert extent_bytes(shape, 256, tp=16) == 10 * MIB


def test_a_latent_is_not_cut_by_tensor_parallelism():
    shape = shape_of("deepseek-v3")
    assert extent_bytes(shape, 64, tp=8) == extent_bytes(shape, 64) == 64 * 61 * 576 * 2


def test_an_extent_of_a_model_with_windows_holds_one_group_of_layers():
    assert extent_bytes(shape_of("gemma-3-270m"), 256) == 256 * 3 * 2 * 256 * 2
    assert extent_bytes(shape_of("gpt-oss-20b"), 256, tp=8) == 256 * 12 * 2 * 64 * 2


def test_of_window_layers_only_the_window_is_loaded():
    shape = shape_of("gpt-oss-20b")
    layer_bytes = 2 * 8 * 64 * 2
    assert loaded_bytes(shape, 100) == 100 * bytes_per_token(shape)
    assert loaded_bytes(shape, 10_000) == layer_bytes * (12 * 10_000 + 12 * 128)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_known_shape_can_be_cut_over_one_rank_and_over_its_heads(shape):
    assert extent_bytes(shape, 256) == extent_bytes(shape, 256, tp=shape.kv_heads) * shape.kv_heads
    assert 0 <= shape.window_layers < shape.layers
    assert (shape.window_tokens > 0) == (shape.window_layers > 0)


def test_a_prefill_in_two_parts_costs_what_it_costs_in_one():
    for name in ("llama-3.1-8b", "gemma-3-27b", "deepseek-v3"):
        shape = shape_of(name)
        for cut in (0, 1, 100, 1024, 3000):
            parts = prefill_flops(shape, 0, cut) + prefill_flops(shape, cut, 3000)
            assert parts == pytest.approx(prefill_flops(shape, 0, 3000), rel=1e-12)


def test_pairs_of_query_and_key_are_counted_one_by_one():
    shape = shape_of("gemma-3-1b")
    pairs = sum(4 * (t + 1) + 22 * min(t + 1, 512) for t in range(300, 900))
    assert prefill_flops(shape, 300, 900) == pytest.approx(2 * 1.0e9 * 600 + pairs * 4 * 4 * 256)


# --- config.json -----------------------------------------------------------------------------------------------------


def test_a_configuration_gives_the_known_model_s_shape(tmp_path):
    found = shape_of(written(tmp_path, LLAMA_8B))
    known = shape_of("llama-3.1-8b")
    assert (found.layers, found.kv_heads, found.head_dim, found.query_heads) == (32, 8, 128, 32)
    assert found.parameters == pytest.approx(known.parameters, rel=0.08)  # embeddings multiply nothing
    assert shape_of(str(tmp_path)) == found


def test_windows_of_a_configuration_are_counted(tmp_path):
    alternating = {**LLAMA_8B, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}
    assert shape_of(written(tmp_path, alternating)).window_layers == 16
    gemma = {**LLAMA_8B, "num_hidden_layers": 62, "sliding_window": 1024, "model_type": "gemma3_text"}
    assert shape_of(written(tmp_path, {"text_config": gemma})).window_layers == 52
    everywhere = {**LLAMA_8B, "sliding_window": 4096}
    assert shape_of(written(tmp_path, everywhere)).window_layers == 32
    switched_off = {**everywhere, "use_sliding_window": False}
    assert shape_of(written(tmp_path, switched_off)).window_layers == 0


def test_a_latent_configuration_is_one_plane(tmp_path):
    latent = {
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    found = shape_of(written(tmp_path, latent))
    assert bytes_per_token(found) == bytes_per_token(shape_of("deepseek-v3"))
    with pytest.raises(ShapeError, match="number of parameters is not known"):
        prefill_flops(found, 0, 1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layers": None}, "whole number above 0 as num_hidden_layers, got null"),
        ({"num_attention_heads": "many"}, 'num_attention_heads, got "many"'),
        ({"layer_types": ["linear_attention"] * 32}, "the layer type linear_attention"),
        ({"layer_types": ["full_attention"]}, "1 layer types for 32 layers"),
        ({"sliding_window": 9, "sliding_window_pattern": "x"}, "as sliding_window_pattern"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_in_words(tmp_path, change, words):
    with pytest.raises(ShapeError, match=words):
        shape_of(written(tmp_path, {**LLAMA_8B, **change}))


def test_files_that_are_no_configuration_are_refused_in_words(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(ShapeError, match="expected a JSON object, got list"):
        shape_of(str(path))
    path.write_text("{")
    with pytest.raises(ShapeError, match="expected the JSON of a Hugging Face"):
        shape_of(str(path))
    with pytest.raises(ShapeError, match=r"model 'llama-9': expected .* one of .*llama-3\.1-70b"):
        shape_of("llama-9")


def test_sizes_that_make_no_sense_are_refused_in_words():
    shape = shape_of("llama-3.1-8b")
    with pytest.raises(ShapeError, match="KV dtype 'int3'"):
        bytes_per_token(shape, "int3")
    with pytest.raises(ShapeError, match="tensor-parallel size 0"):
        extent_bytes(shape, 256, tp=0)
    with pytest.raises(ShapeError, match="tensor-parallel size 3: expected a divisor or a multiple of the 8 KV heads"):
        extent_bytes(shape, 256, tp=3)
    with pytest.raises(ShapeError, match="chunk of 0 tokens"):
        extent_bytes(shape, 0)
