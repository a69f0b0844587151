"""Tokendepot: a warehouse for the KV cache of LLM inference.

A depot is a set of directories. `Depot` opens them; `inspect_root` and its siblings look at one from outside.
See docs/architecture.md for how the parts fit together.
"""

from ._core import (
    FORMAT_VERSION,
    KEY_BYTES,
    SKIP_BLOCK,
    Depot,
    DepotError,
    GroupWant,
    KeyChain,
    describe_plan,
    evict_segments,
    inspect_root,
    list_extents,
    parse_options,
    parse_size,
    plan_store,
    remove_extents,
    verify_extents,
    version,
)

__version__ = version()

__all__ = [
    "FORMAT_VERSION",
    "KEY_BYTES",
    "SKIP_BLOCK",
    "Depot",
    "DepotError",
    "GroupWant",
    "KeyChain",
    "__version__",
    "describe_plan",
    "evict_segments",
    "inspect_root",
    "list_extents",
    "parse_options",
    "parse_size",
    "plan_store",
    "remove_extents",
    "verify_extents",
    "version",
]
