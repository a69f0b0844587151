"""vLLM connector: `--kv-transfer-config` with `"kv_connector_module_path": "tokendepot.engines.vllm"`.

The connector is a raw `KVConnectorBase_V1` with `SupportsHMA`, one code base for vLLM 0.20 to 0.33:

* `bystander` - looks whether this release fits the connector, and stands in with one that does nothing where it does not.
* `connector` - the class that vLLM loads; forwards each hook to one of the two halves and never lets an error out.
* `scheduler` - the half in the scheduler process: keys, look-ups, promises, what to store.
* `worker` - the half in each worker process: moves this rank's shards, reports what failed.
* `groups` - what both halves must agree on about the KV-cache groups; `geometry` - tensors to addresses.
* `identity` - the namespace manifest; `settings` - the configuration; `messages` - what travels between the halves.
* `stats` - metrics; `versions` - everything that differs between vLLM releases.
"""

from typing import TYPE_CHECKING

from tokendepot.engines.vllm.bystander import connector_class

if TYPE_CHECKING:
    from tokendepot.engines.vllm.connector import TokendepotConnector
else:
    TokendepotConnector = connector_class()

__all__ = ["TokendepotConnector"]
