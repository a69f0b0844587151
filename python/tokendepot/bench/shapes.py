"""How many bytes of KV cache a token takes: the shapes of well-known models, and of any Hugging Face config.json.

Shapes are facts of the models' published config.json files; parameter counts are those of the model cards. All
functions are pure and thread-safe; wrong names and values raise `ShapeError`, whose text names what was expected.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

BYTES_OF_DTYPE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
TENSOR_PARALLEL_MAX = 1024


class ShapeError(ValueError):
    """A model, data type or size that cannot be used, in one sentence for the user."""


@dataclass(frozen=True)
class Shape:
    """What decides the size of a model's KV cache and the cost of a prefill.

    Attributes:
        name: as `shape_of` takes it.
        layers: all layers that keep KV.
        kv_heads: KV heads of the whole model; 1 where all heads share one latent (MLA).
        head_dim: elements of one KV head, per token and plane.
        planes: 2 = keys and values; 1 = one latent (MLA), which every rank holds and one rank stores.
        query_heads: query heads of the whole model.
        parameters: weights that work on each token (of a mixture of experts the active ones); None = not known.
        window_layers: how many of `layers` attend only to the last `window_tokens` tokens.
        query_dim, value_dim: elements of a head in QK^T and in the weighted sum of values; 0 = head_dim.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int
    parameters: float | None
    planes: int = 2
    window_layers: int = 0
    window_tokens: int = 0
    query_dim: int = 0
    value_dim: int = 0

    @property
    def full_layers(self) -> int:
        return self.layers - self.window_layers

    @property
    def group_layers(self) -> int:
        """Layers of one KV-cache group. Engines cut a mix of full and window layers into groups of the rarer kind's size."""
        return min(self.full_layers, self.window_layers) or self.layers


def _latent(name: str, layers: int, query_heads: int, parameters: float) -> Shape:
    """Multi-head latent attention as in DeepSeek-V2 and V3: 512 compressed elements and 64 of the rotary key."""
    return Shape(name, layers, 1, 576, query_heads, parameters, planes=1, query_dim=192, value_dim=128)


_KNOWN = (
    Shape("llama-3.1-8b", 32, 8, 128, 32, 8.03e9),
    Shape("llama-3.1-70b", 80, 8, 128, 64, 70.6e9),
    Shape("llama-3.1-405b", 126, 8, 128, 128, 405.9e9),
    Shape("llama-3.2-1b", 16, 8, 64, 32, 1.24e9),
    Shape("llama-3.2-3b", 28, 8, 128, 24, 3.21e9),
    Shape("llama-3.3-70b", 80, 8, 128, 64, 70.6e9),
    Shape("qwen2.5-7b", 28, 4, 128, 28, 7.62e9),
    Shape("qwen2.5-72b", 80, 8, 128, 64, 72.7e9),
    Shape("qwen3-0.6b", 28, 8, 128, 16, 0.6e9),
    Shape("qwen3-1.7b", 28, 8, 128, 16, 1.7e9),
    Shape("qwen3-4b", 36, 8, 128, 32, 4.0e9),
    Shape("qwen3-8b", 36, 8, 128, 32, 8.2e9),
    Shape("qwen3-14b", 40, 8, 128, 40, 14.8e9),
    Shape("qwen3-32b", 64, 8, 128, 64, 32.8e9),
    Shape("qwen3-30b-a3b", 48, 4, 128, 32, 3.3e9),
    Shape("qwen3-235b-a22b", 94, 4, 128, 64, 22e9),
    Shape("gemma-3-270m", 18, 1, 256, 4, 0.27e9, window_layers=15, window_tokens=512),
    Shape("gemma-3-1b", 26, 1, 256, 4, 1.0e9, window_layers=22, window_tokens=512),
    Shape("gemma-3-4b", 34, 4, 256, 8, 3.9e9, window_layers=29, window_tokens=1024),
    Shape("gemma-3-12b", 48, 8, 256, 16, 11.8e9, window_layers=40, window_tokens=1024),
    Shape("gemma-3-27b", 62, 16, 128, 32, 27e9, window_layers=52, window_tokens=1024),
    Shape("gpt-oss-20b", 24, 8, 64, 64, 3.6e9, window_layers=12, window_tokens=128),
    Shape("gpt-oss-120b", 36, 8, 64, 64, 5.1e9, window_layers=18, window_tokens=128),
    Shape("mistral-7b", 32, 8, 128, 32, 7.25e9),
    _latent("deepseek-v3", 61, 128, 37e9),
    _latent("kimi-k2", 61, 64, 32e9),
)
SHAPES = {shape.name: shape for shape in _KNOWN}


def shape_of(name: str) -> Shape:
    """The shape of a model: one of `SHAPES`, or the path of a Hugging Face config.json (or of the directory it is in).

    Raises:
        ShapeError: neither a known name nor a file that can be read as such a configuration.
    """
    known = SHAPES.get(name.lower())
    if known is not None:
        return known
    path = os.path.join(name, "config.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        raise ShapeError(f"model '{name}': expected the path of a config.json or one of {', '.join(sorted(SHAPES))}")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except OSError as error:
        raise ShapeError(f"model '{path}': cannot be read: {error.strerror}") from None
    except ValueError:
        raise ShapeError(f"model '{path}': expected the JSON of a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise ShapeError(f"model '{path}': expected a JSON object, got {type(config).__name__}")
    text = config.get("text_config")
    return _shape_of_config(path, text if isinstance(text, dict) else config)


def element_bytes(dtype: str) -> int:
    """Bytes of one KV element. Scales of fp8 are not counted: a few bytes a page."""
    if dtype not in BYTES_OF_DTYPE:
        raise ShapeError(f"KV dtype '{dtype}': expected one of {', '.join(BYTES_OF_DTYPE)}")
    return BYTES_OF_DTYPE[dtype]


def bytes_per_token(shape: Shape, dtype: str = "bf16") -> int:
    """Bytes that a token takes in a depot, over all layers and ranks. Window layers count: every chunk of them is stored."""
    return shape.layers * shape.planes * shape.kv_heads * shape.head_dim * element_bytes(dtype)


def loaded_bytes(shape: Shape, tokens: int, dtype: str = "bf16") -> int:
    """Bytes that move when a prefix of `tokens` is loaded: of window layers only the window's."""
    per_layer = shape.planes * shape.kv_heads * shape.head_dim * element_bytes(dtype)
    windowed = min(tokens, shape.window_tokens) * shape.window_layers
    return per_layer * (tokens * shape.full_layers + windowed)


def extent_bytes(shape: Shape, chunk_tokens: int = 256, tp: int = 1, dtype: str = "bf16") -> int:
    """Payload bytes of one extent: one chunk, one rank, one KV-cache group (`Shape.group_layers`); headers come on top.

    `tp` ranks share the KV heads; where there are fewer heads than ranks, and for MLA, an extent does not get smaller.
    """
    if chunk_tokens < 1:
        raise ShapeError(f"chunk of {chunk_tokens} tokens: expected 1 or more")
    if not 1 <= tp <= TENSOR_PARALLEL_MAX:
        raise ShapeError(f"tensor-parallel size {tp}: expected 1 to {TENSOR_PARALLEL_MAX}")
    if max(tp, shape.kv_heads) % min(tp, shape.kv_heads):
        raise ShapeError(f"tensor-parallel size {tp}: expected a divisor or a multiple of the {shape.kv_heads} KV heads")
    heads = max(1, shape.kv_heads // tp)
    return chunk_tokens * shape.group_layers * shape.planes * heads * shape.head_dim * element_bytes(dtype)


def prefill_flops(shape: Shape, begin: int, end: int) -> float:
    """Floating-point operations to compute tokens [begin, end) of a prompt whose first `begin` tokens are in the cache.

    Two operations a weight and token, and for each pair of query and visible key two an element in QK^T and two in
    the sum of values (the count of Kaplan et al. 2020, section 2.1, with causal masking counted exactly).

    Raises:
        ShapeError: the shape's parameters are not known.
    """
    if shape.parameters is None:
        raise ShapeError(f"model '{shape.name}': its number of parameters is not known, so a prefill rate must be given")
    a_pair = 2 * shape.query_heads * ((shape.query_dim or shape.head_dim) + (shape.value_dim or shape.head_dim))
    pairs = shape.full_layers * _visible_pairs(begin, end, end)
    if shape.window_layers:
        pairs += shape.window_layers * _visible_pairs(begin, end, shape.window_tokens)
    return 2 * shape.parameters * (end - begin) + a_pair * pairs


def _visible_pairs(begin: int, end: int, window: int) -> int:
    """Pairs of a query in [begin, end) and a key at or before it, at most `window` keys a query."""
    ramp_end = min(end, window)
    ramp = (begin + 1 + ramp_end) * (ramp_end - begin) // 2 if ramp_end > begin else 0
    return ramp + (end - max(begin, ramp_end)) * window


# --- config.json -----------------------------------------------------------------------------------------------------


def _shape_of_config(path: str, config: dict[str, Any]) -> Shape:
    def whole(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ShapeError(f"model '{path}': expected a whole number above 0 as {key}, got {json.dumps(value)}")
        return value

    layers, query_heads = whole("num_hidden_layers"), whole("num_attention_heads")
    window_layers = _window_layers(path, config, layers)
    window_tokens = whole("sliding_window") if window_layers else 0
    if config.get("kv_lora_rank") is not None:
        rope = whole("qk_rope_head_dim")
        value_dim = whole("v_head_dim")
        query_dim = whole("qk_nope_head_dim") + rope
        latent = whole("kv_lora_rank") + rope
        return Shape(
            path, layers, 1, latent, query_heads, None, 1, window_layers, window_tokens, query_dim, value_dim
        )
    head_dim = config.get("head_dim") and whole("head_dim")
    if not head_dim:
        head_dim = whole("hidden_size") // query_heads
    kv_heads = whole("num_key_value_heads", query_heads)
    parameters = _dense_parameters(config, layers, query_heads, kv_heads, head_dim)
    return Shape(
        path,
        layers,
        kv_heads,
        head_dim,
        query_heads,
        parameters,
        window_layers=window_layers,
        window_tokens=window_tokens,
    )


def _window_layers(path: str, config: dict[str, Any], layers: int) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        strange = {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}
        if strange or len(kinds) != layers:
            what = f"the layer type {min(strange)}" if strange else f"{len(kinds)} layer types for {layers} layers"
            raise ShapeError(f"model '{path}': expected full_attention or sliding_attention for each layer, got {what}")
        return kinds.count("sliding_attention")
    # Qwen's configurations carry a window that a switch turns off.
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0
    # Gemma 3's first configurations leave the pattern to the default of the code: each sixth layer sees everything.
    default = 6 if str(config.get("model_type", "")).startswith("gemma3") else 0
    pattern = config.get("sliding_window_pattern") or default
    if not isinstance(pattern, int) or pattern < 0:
        raise ShapeError(f"model '{path}': expected a whole number as sliding_window_pattern, got {json.dumps(pattern)}")
    return layers - (layers // pattern if pattern else 0)


def _dense_parameters(
    config: dict[str, Any], layers: int, query_heads: int, kv_heads: int, head_dim: int
) -> float | None:
    """Weights of a dense decoder with gated feed-forward layers; None where the configuration speaks of experts."""
    sizes = [config.get(key) for key in ("hidden_size", "intermediate_size", "vocab_size")]
    if any("expert" in key for key in config) or not all(isinstance(size, int) for size in sizes):
        return None
    hidden, inner, vocabulary = sizes
    attention = 2 * hidden * head_dim * (query_heads + kv_heads)
    return float(layers * (attention + 3 * hidden * inner) + hidden * vocabulary)
