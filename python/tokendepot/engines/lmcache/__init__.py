"""LMCache's storage in a depot: `DepotConnector` is what its `native_plugin` adapter loads. See docs/lmcache.md."""

from tokendepot.engines.lmcache.connector import DepotConnector
from tokendepot.engines.lmcache.settings import RefusedError

__all__ = ["DepotConnector", "RefusedError"]
