"""Everything that differs between the supported vLLM releases, in one place."""

from __future__ import annotations

import logging
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.logger import init_logger

from ..vllm_releases import NEWEST_TESTED, parse

# vLLM gives handlers to its own logger tree only, so ours hangs below it.
log: logging.Logger = init_logger("vllm.tokendepot")


VLLM = parse(vllm.__version__)

# 0.29 made [blocks, heads, tokens, content] the logical shape of every per-layer cache tensor; before, each attention
# backend declares its own through get_kv_cache_shape().
UNIFORM_CACHE_SHAPE = VLLM >= (0, 29)

# 0.30 added failed_recving. Before, the only channel for a failed load was block ids, and those kill an engine that has
# several KV-cache groups; so there a load of several groups must not be promised at all.
REQUEST_LEVEL_FAILURES = VLLM >= (0, 30)


def warn_if_untested() -> None:
    if VLLM > NEWEST_TESTED:
        log.warning(
            "tokendepot: vLLM %s is newer than the newest tested release (%d.%d)",
            vllm.__version__,
            *NEWEST_TESTED,
        )


def transfer_results(finished: set[str], failed: set[str]) -> Any:
    """The answer to get_transfer_results(); vLLM calls that from 0.30 on only."""
    return base.KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)


def use_recompute_policy(kv_transfer_config: Any) -> None:
    """Makes a failed load a recomputation instead of a failed request.

    vLLM's default policy is "fail". Its scheduler reads the policy after it has created the connector (all supported
    releases), so the value set here counts. Under MultiConnector the outer configuration stays as it is, hence the
    warning.
    """
    policy = getattr(kv_transfer_config, "kv_load_failure_policy", "recompute")
    if policy == "recompute":
        return
    try:
        kv_transfer_config.kv_load_failure_policy = "recompute"
        log.warning(
            'tokendepot: kv_load_failure_policy was "%s" (vLLM\'s default), under which a failed load '
            "fails its request; "
            'changed to "recompute" (set it yourself on the outer configuration when using MultiConnector)',
            policy,
        )
    except (AttributeError, TypeError, ValueError):
        log.warning(
            'tokendepot: kv_load_failure_policy is "%s": a failed load fails its request; set it to '
            '"recompute"',
            policy,
        )


def chunk_drop_needed(speculative_config: Any) -> bool:
    """True when a draft model reads the target's KV: a chunk's last cell then depends on the token after the chunk."""
    if speculative_config is None:
        return False
    use_eagle = getattr(speculative_config, "use_eagle", None)
    return bool(use_eagle()) if callable(use_eagle) else False


def declared_shape(vllm_config: Any, layer_name: str, cache_dtype: str) -> tuple[str, ...] | None:
    """Names of the dimensions of a layer's cache tensor as its attention backend declares them, or None.

    Names: B blocks, H heads, N tokens, D one plane's row, C all planes' row, P plane. Backends are asked with sizes
    that cannot be confused with each other, so no shape is ever guessed from the tensor. A last dimension that is none
    of these is a row with something in it beside the head's values (the scales of fp8 MLA caches): C as well.
    """
    if UNIFORM_CACHE_SHAPE:
        return ("B", "H", "N", "C")
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    get_backend = getattr(layer, "get_attn_backend", None)
    if get_backend is None:
        return None
    sizes = {"B": 1009, "N": 176, "H": 7, "D": 96}
    try:
        shape = get_backend().get_kv_cache_shape(
            num_blocks=sizes["B"],
            block_size=sizes["N"],
            num_kv_heads=sizes["H"],
            head_size=sizes["D"],
            cache_dtype_str=cache_dtype,
        )
    except (TypeError, ValueError, NotImplementedError, AssertionError):
        return None
    by_size = {size: name for name, size in sizes.items()} | {2 * sizes["D"]: "C", 2: "P"}
    names = tuple(by_size.get(size, "?") for size in shape)
    if names and names[-1] == "?":
        names = (*names[:-1], "C")
    return None if "?" in names or len(set(names)) != len(names) else names


def backend_name(vllm_config: Any, layer_name: str) -> str:
    """Name of the attention backend of a layer ("CPU_ATTN"), "" when no layer is known by that name."""
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    get_backend = getattr(layer, "get_attn_backend", None)
    return str(get_backend().get_name()) if get_backend is not None else ""
