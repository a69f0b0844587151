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
    drop_policies,
    evict_segments,
    inspect_policies,
    inspect_root,
    list_extents,
    parse_options,
    parse_size,
    plan_store,
    remove_extents,
    set_policy,
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
    "drop_policies",
    "evict_segments",
    "inspect_policies",
    "inspect_root",
    "list_extents",
    "parse_options",
    "parse_size",
    "plan_store",
    "remove_extents",
    "set_policy",
    "verify_extents",
    "version",
]
