"""Engine-less vLLM: the real Scheduler, KV-cache manager and connector pair of whatever vLLM is first on sys.path.

The worker is a stand-in that knows only what SchedulerOutput tells it. Its "model" reads every KV cell that a query may
see, on every layer, head and plane, so one wrong, missing or misplaced cell changes the text. No kernels, no weights.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_TARGET_DEVICE"] = "cpu"

import torch
from fake_cache import DEFAULT_FAMILY, DIM, HEADS, KV_TYPES, VERSION, FakeBackend, allocate, layer_name
from vllm.config import KVEventsConfig, KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

torch.set_num_threads(1)  # small tensors: more threads only wait for each other
LAYERS, WINDOW = 4, 40
STUCK_AFTER_S = 60.0
PLANES, DIMS = torch.arange(2)[:, None], torch.arange(DIM)


@dataclass
class Options:
    root: str = ""
    blocks: int = 400
    block_size: int = 16
    chunk: int = 64
    layout: str = "canonical"
    family: str = DEFAULT_FAMILY
    hybrid: bool = False
    latent: bool = False  # says that the cells are MLA's
    tp: int = 1
    pp: int = 1
    policy: str = "recompute"
    asynchronous: bool = False
    drafts: int = 0
    prefix_caching: bool = True
    role: str = "kv_both"
    dtype: str = "float32"  # of the model
    kv_dtype: str = "auto"  # of the cache, as it is configured
    batched_tokens: int = 128
    extra: dict = field(default_factory=dict)
    capacity: str = "64MiB"
    without_hybrid_manager: bool = False
    events: str = ""  # endpoint of the engine's publisher; with "-replay" behind it that of its replays
    late_gathers: int = 0  # steps by which stores read their blocks late, 0 = within their step

    @property
    def cells(self) -> tuple[torch.dtype, int]:
        return KV_TYPES[self.dtype if self.kv_dtype == "auto" else self.kv_dtype]


_configs: dict = {}


def base_config(model: str, drafts: int, dtype: str):
    """Creating a configuration takes seconds, so each kind is made once a process and copied."""
    key = (model, drafts, dtype)
    if key not in _configs:
        speculative = dict(
            method="ngram", num_speculative_tokens=drafts, prompt_lookup_max=3, prompt_lookup_min=1
        )
        _configs[key] = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            max_model_len=2048,
            block_size=16,
            dtype=dtype,
            async_scheduling=False,
            speculative_config=speculative if drafts else None,
        ).create_engine_config()
    return copy.deepcopy(_configs[key])


class LateGathers:
    """A depot whose stores read their blocks some steps late, as on a busy GPU: who gives a block away must wait."""

    def __init__(self, depot, steps: int) -> None:
        self._depot, self._steps = depot, steps
        self._now = 0
        self._late: list[tuple[int, int, bytes]] = []

    def __getattr__(self, name: str):
        return getattr(self._depot, name)

    def submit_store(self, job: int, plan: bytes) -> None:
        self._late.append((self._now + self._steps, job, plan))

    def poll(self) -> list[dict]:
        self._now += 1
        self._read(lambda due: due <= self._now)
        return self._depot.poll()

    def wait_gathered(self, timeout_s: float) -> bool:
        return self._read(lambda due: True)

    def flush(self, timeout_s: float) -> bool:
        return self._read(lambda due: True) and self._depot.flush(timeout_s)

    def _read(self, is_due) -> bool:
        for _, job, plan in (late for late in self._late if is_due(late[0])):
            self._depot.submit_store(job, plan)
        self._late = [late for late in self._late if not is_due(late[0])]
        return self._depot.wait_gathered(30.0)


class Rank:
    """One worker: its connector half and its part of the cache."""

    def __init__(self, engine: Engine, rank: int) -> None:
        o = engine.options
        self.tp_rank, self.pp_rank = rank % o.tp, rank // o.tp
        self.heads = max(1, HEADS // o.tp)
        self.first_head = self.tp_rank * HEADS // o.tp
        share = LAYERS // o.pp
        self.layer_ids = range(self.pp_rank * share, (self.pp_rank + 1) * share)
        config = copy.deepcopy(engine.config)
        config.parallel_config.rank = rank
        config.kv_transfer_config = engine.config.kv_transfer_config
        self.kv_cache_config = engine.cache_config(self.layer_ids, self.heads)
        for name in engine.names:
            config.compilation_config.static_forward_context[name] = SimpleNamespace(
                get_attn_backend=lambda: FakeBackend(o.family)
            )
        with set_current_vllm_config(config):
            self.connector = KVConnectorFactory.create_connector(
                config, KVConnectorRole.WORKER, self.kv_cache_config
            )
        self.tensors, self.cells = allocate(o, self.layer_ids, self.heads)
        self.connector.register_kv_caches(self.tensors)
        if o.late_gathers:
            half = self.connector._worker_half
            half._depot = LateGathers(half._depot, o.late_gathers)
            half._stores_hold_up_step = False

@dataclass
class Sequence:
    """What the worker knows of one request."""

    tokens: list[int]
    tables: list[list[int]]
    drafts: list[int] = field(default_factory=list)
    _states: list[int] = field(default_factory=list)

    def states_of(self, tokens: list[int]) -> list[int]:
        """A number for each token that depends on all tokens up to it. `tokens` begin like `self.tokens`, which only grow."""
        own = min(len(tokens), len(self.tokens))
        _extend(self._states, tokens[len(self._states) : own])
        states = self._states[: len(tokens)]
        _extend(states, tokens[len(states) :])
        return states


def _extend(states: list[int], tokens: list[int]) -> None:
    state = states[-1] if states else 0
    for token in tokens:
        state = (state * 1000003 + token + 7) % 65521
        states.append(state)


class Engine:
    def __init__(self, model: str, options: Options) -> None:
        self.options = o = options
        self.names = [layer_name(layer) for layer in range(LAYERS)]
        self.config = base_config(model, o.drafts, o.dtype)
        extra = {
            "roots": [f"{o.root}?capacity={o.capacity}"],
            "chunk_tokens": o.chunk,
            "layout": o.layout,
            "free_space_reserve": "1MiB",
            "scrub_rate": 0,  # it would find planted damage before a load does
            "slab": "16MiB",
            "min_load_tokens": o.chunk,  # whatever this machine measures, hits are loaded
            **o.extra,
        }
        self.config.kv_transfer_config = KVTransferConfig(
            kv_connector="TokendepotConnector",
            kv_connector_module_path="tokendepot.engines.vllm",
            kv_role=o.role,
            kv_load_failure_policy=o.policy,
            kv_connector_extra_config=extra,
        )
        if o.events:
            self.config.kv_events_config = KVEventsConfig(
                enable_kv_cache_events=True, endpoint=o.events, replay_endpoint=f"{o.events}-replay"
            )
        self.config.cache_config.block_size = o.block_size
        self.config.cache_config.cache_dtype = o.kv_dtype
        self.config.cache_config.num_gpu_blocks = o.blocks
        self.config.cache_config.enable_prefix_caching = o.prefix_caching
        self.config.scheduler_config.max_num_batched_tokens = o.batched_tokens
        self.config.scheduler_config.async_scheduling = o.asynchronous
        self.config.parallel_config.tensor_parallel_size = o.tp
        self.config.parallel_config.pipeline_parallel_size = o.pp
        self.config.parallel_config.world_size = o.tp * o.pp
        scheduler_cache = self.cache_config(range(LAYERS // o.pp), max(1, HEADS // o.tp))
        hash_fn = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        kv_cache_utils.init_none_hash(hash_fn)
        self.hasher = kv_cache_utils.get_request_block_hasher(o.block_size, hash_fn)
        if o.without_hybrid_manager:
            self.config.scheduler_config.disable_hybrid_kv_cache_manager = True
        kind = AsyncScheduler if o.asynchronous else Scheduler
        with set_current_vllm_config(self.config):
            self.scheduler = kind(
                self.config,
                scheduler_cache,
                StructuredOutputManager(self.config),
                block_size=o.block_size,
                log_stats=True,
            )
        self.ranks = [Rank(self, rank) for rank in range(o.tp * o.pp)]
        self.aggregator = KVOutputAggregator(len(self.ranks))
        self.sequences: dict[str, Sequence] = {}
        self.stats: dict[str, float] = {}
        self.output: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.between = None  # called with the SchedulerOutput before the worker sees it
        self.spoil_loads = False  # negative control: what was loaded is overwritten with garbage, silently
        self.draft_from: dict[tuple[int, ...], list[int]] = {}
        self.preemptions = 0
        self.external = 0
        self.count = 0
        self.waiting_update = None
        self._loading: dict[str, list] = {}

    def cache_config(self, layers, heads: int) -> KVCacheConfig:
        o = self.options
        layers = list(layers)
        names = [layer_name(layer) for layer in layers]
        full = FullAttentionSpec(
            block_size=o.block_size, num_kv_heads=heads, head_size=DIM, dtype=o.cells[0]
        )
        if o.hybrid:
            window = SlidingWindowSpec(
                block_size=o.block_size,
                num_kv_heads=heads,
                head_size=DIM,
                dtype=o.cells[0],
                sliding_window=WINDOW,
            )
            half = len(names) // 2
            groups = [KVCacheGroupSpec(names[:half], full), KVCacheGroupSpec(names[half:], window)]
        elif o.latent:
            latent = MLAAttentionSpec(
                block_size=o.block_size, num_kv_heads=1, head_size=2 * heads * DIM, dtype=o.cells[0]
            )
            groups = [KVCacheGroupSpec(names, latent)]
        else:
            groups = [KVCacheGroupSpec(names, full)]
        page = full.page_size_bytes
        if "shared_by" in KVCacheTensor.__dataclass_fields__:
            tensors = [KVCacheTensor(size=o.blocks * page, shared_by=[name]) for name in names]
        else:
            tensors = [
                KVCacheTensor(
                    size=len(names) * o.blocks * page,
                    layers=names,
                    layer_stride=o.blocks * page,
                    block_stride=page,
                )
            ]
        config = KVCacheConfig(num_blocks=o.blocks, kv_cache_tensors=tensors, kv_cache_groups=groups)
        if "kv_cache_layout" in KVCacheConfig.__dataclass_fields__:
            layout = {"BNHC": "LBNHC", "BLHNC": "BLHNC"}.get(o.family, "LBHNC")
            config.kv_cache_layout = self.config.cache_config.kv_cache_layout = layout
        return config

    # --- the fake model ---------------------------------------------------------------------------------------------

    def group_of(self, layer: int) -> int:
        return 1 if self.options.hybrid and layer >= LAYERS // 2 else 0

    def write(self, sequence: Sequence, tokens: list[int], start: int) -> None:
        """Fills the cells of positions [start, len(tokens)); their content depends on all tokens up to there."""
        states = sequence.states_of(tokens)
        position = torch.arange(start, len(tokens))
        value = torch.tensor(states[start:])[:, None, None, None]
        size = self.options.block_size
        places = self.places(sequence, position)
        for rank in self.ranks:
            head = torch.arange(rank.first_head, rank.first_head + rank.heads)[None, :, None, None]
            content = value + (7 * head + 3 * PLANES + DIMS)
            for layer, cells in rank.cells.items():
                content_of_layer = (content + 31 * layer) % self.options.cells[1]
                cells[places[self.group_of(layer)], :, position % size] = content_of_layer.to(cells.dtype)

    def places(self, sequence: Sequence, position: torch.Tensor) -> list[torch.Tensor]:
        """For each group, the block of each position."""
        return [torch.tensor(table)[position // self.options.block_size] for table in sequence.tables]

    def read(self, sequence: Sequence, length: int, first: int) -> list[int]:
        """The token after each position in [first, length), as a function of all cells visible from it."""
        position = torch.arange(length)
        mix = (position * 7919 + 13) % 9973
        places, offset = self.places(sequence, position), position % self.options.block_size
        index = torch.arange(first, length)
        totals = torch.zeros(length - first, dtype=torch.int64)
        weights = [
            (1 + 17 * torch.arange(rank.first_head, rank.first_head + rank.heads)[:, None, None] + (5 * PLANES + DIMS))
            .flatten()
            .to(torch.float64)
            for rank in self.ranks
        ]
        for layer in range(LAYERS):
            group = self.group_of(layer)
            begin = max(0, first - WINDOW + 1) if group else 0
            value = torch.zeros(length - begin, dtype=torch.float64)
            for rank, weight in zip(self.ranks, weights, strict=True):
                if layer in rank.cells:
                    rows = rank.cells[layer][places[group][begin:], :, offset[begin:]]
                    value += rows.flatten(1).to(torch.float64) @ weight  # small whole numbers: exact
            value = value.to(torch.int64) % 1000003 * (mix[begin:] * (layer + 1) % 9973) % 1000003
            sums = torch.cat([torch.zeros(1, dtype=torch.int64), value.cumsum(0)])
            low = (index - WINDOW + 1).clamp(min=0) if group else torch.zeros_like(index)
            totals += sums[index + 1 - begin] - sums[low - begin]
        return [total % 240 + 3 for total in totals.tolist()]

    def forward(self, so) -> tuple[list[str], list[list[int]]]:
        for new in so.scheduled_new_reqs:
            tokens = list(getattr(new, "prefill_token_ids", None) or new.prompt_token_ids)
            self.sequences[new.req_id] = Sequence(tokens, [list(ids) for ids in new.block_ids])
            self.starts[new.req_id] = new.num_computed_tokens
        cached = so.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            sequence, ids = self.sequences[request_id], cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                sequence.tables = [list(group) for group in ids]
            elif ids is not None:
                for table, more in zip(sequence.tables, ids, strict=True):
                    table.extend(more)
            self.starts[request_id] = cached.num_computed_tokens[index]
        names, sampled = [], []
        work = []
        for request_id, count in so.num_scheduled_tokens.items():
            sequence, start = self.sequences[request_id], self.starts[request_id]
            drafts = [int(token) for token in so.scheduled_spec_decode_tokens.get(request_id, ())]
            length = start + count
            tokens = (sequence.tokens + drafts)[:length]
            self.write(sequence, tokens, start)
            work.append((request_id, sequence, tokens, len(drafts)))
        for (
            request_id,
            sequence,
            tokens,
            drafts,
        ) in work:  # like a batch: all cells are written before any is read
            names.append(request_id)
            if len(tokens) - drafts < len(sequence.tokens):
                sampled.append([])
                continue
            after = self.read(sequence, len(tokens), len(tokens) - drafts - 1)
            accepted = [after[0]]
            for place in range(drafts):
                if tokens[len(tokens) - drafts + place] != accepted[-1]:
                    break
                accepted.append(after[place + 1])
            sequence.tokens = sequence.tokens + accepted
            sampled.append(accepted)
        return names, sampled

    # --- one engine step --------------------------------------------------------------------------------------------

    def step(self) -> None:
        so = self.scheduler.schedule()
        if self.between is not None:
            self.between(so)
        if self.waiting_update is not None:
            self._update(*self.waiting_update)
            self.waiting_update = None
        result = self._execute(so)
        if self.options.asynchronous and so.total_num_scheduled_tokens:
            self.waiting_update = (so, result)
        else:
            self._update(so, result)

    def _execute(self, so) -> ModelRunnerOutput:
        self.starts: dict[str, int] = {}
        metadata = so.kv_connector_metadata
        for order in getattr(metadata, "loads", ()):
            self._loading[order.request_id] = order.groups
            self.external += 1
        after = not getattr(so, "has_sync_kv_loads", True)
        for rank in self.ranks:
            rank.connector.handle_preemptions(metadata)
            rank.connector.bind_connector_metadata(metadata)
            if not after:
                rank.connector.start_load_kv(None)
        names, sampled = self.forward(so)
        outputs = []
        for rank in self.ranks:
            if after:
                rank.connector.start_load_kv(None)
            rank.connector.wait_for_save()
            outputs.append(
                ModelRunnerOutput(
                    req_ids=names,
                    req_id_to_index={name: index for index, name in enumerate(names)},
                    sampled_token_ids=sampled,
                    kv_connector_output=self._connector_output(rank.connector, so),
                )
            )
            rank.connector.clear_connector_metadata()
        self._draft(names)
        merged = self.aggregator.aggregate(outputs)
        stats = merged.kv_connector_output.kv_connector_stats
        self._add_stats(stats)
        return merged

    def _add_stats(self, stats) -> None:
        for key, value in (stats.data if stats is not None else {}).items():
            if isinstance(value, (int, float)):  # MultiConnector nests one set for each of its connectors
                self.stats[key] = self.stats.get(key, 0) + value

    def _connector_output(self, connector, so) -> KVConnectorOutput:
        output = KVConnectorOutput()
        if VERSION >= (0, 30):
            results = connector.get_transfer_results(so.finished_req_ids)
            output.finished_sending, output.finished_recving = (
                results.finished_sending,
                results.finished_recving,
            )
            output.failed_recving = results.failed_recving
        else:
            output.finished_sending, output.finished_recving = connector.get_finished(so.finished_req_ids)
        output.invalid_block_ids = connector.get_block_ids_with_load_errors()
        output.kv_connector_stats = connector.get_kv_connector_stats()
        output.kv_connector_worker_meta = connector.build_connector_worker_meta()
        for request_id in output.finished_recving or ():
            if self.spoil_loads:
                self._spoil(self._loading.get(request_id, ()))
        return output

    def _spoil(self, groups) -> None:
        for places in groups:
            for block in places.wanted():
                for rank in self.ranks:
                    for layer, cells in rank.cells.items():
                        if self.group_of(layer) == places.group:
                            cells[block] = 12345.0

    def _draft(self, names: list[str]) -> None:
        if not self.options.drafts:
            return
        for name in names:
            sequence = self.sequences[name]
            sequence.drafts = self.draft_from.get(tuple(sequence.tokens[:8]), [])[
                len(sequence.tokens) : len(sequence.tokens) + self.options.drafts
            ]
            if len(sequence.drafts) == self.options.drafts and len(sequence.tokens) % 3 == 0:
                sequence.drafts[-1] = 1  # a draft that will be rejected
        self.scheduler.update_draft_token_ids(
            DraftTokenIds(names, [self.sequences[name].drafts for name in names])
        )

    def _update(self, so, result: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(so, result).values():
            for item in outputs.outputs:
                self.output.setdefault(item.request_id, []).extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.reasons[item.request_id] = str(item.finish_reason)
        self.preemptions += sum(request.num_preemptions for request in self.scheduler.requests.values())

    # --- driving it ---------------------------------------------------------------------------------------------------

    def add(self, prompt: list[int], length: int, salt=None, lora=None) -> str:
        request_id = f"r{self.count}"
        self.count += 1
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                pooling_params=None,
                cache_salt=salt,
                lora_request=lora,
                sampling_params=SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
                block_hasher=self.hasher,
            )
        )
        return request_id

    def step_until_ended(self, request_ids: list[str]) -> None:
        started = time.monotonic()
        while not all(request_id in self.reasons for request_id in request_ids):
            self.step()
            assert time.monotonic() - started < STUCK_AFTER_S, self.state()

    def finish(self, request_ids: list[str]) -> None:
        """Steps until these requests have ended, then lets the depot finish its stores."""
        self.step_until_ended(request_ids)
        self.settle()

    def settle(self) -> None:
        """Steps until no request holds a block, then waits for the stores and reads the journals."""
        started = time.monotonic()
        while self.scheduler.requests or self.scheduler.has_requests() or self.waiting_update is not None:
            self.step()
            assert time.monotonic() - started < STUCK_AFTER_S, self.state()
        for rank in self.ranks:
            worker = getattr(rank.connector, "_worker_half", None)  # one that does nothing has no halves
            if worker is not None and not worker._off:
                assert worker._depot.flush(30.0)
        self.step()
        if self.waiting_update is not None:
            self.step()
        half = self.half
        if half is not None and not half._off:
            half._depot.refresh()
        self.scheduler.reset_prefix_cache()

    def run(self, prompts, length: int = 20, salt=None, lora=None) -> list[list[int]]:
        ids = [self.add(prompt, length, salt, lora) for prompt in prompts]
        self.finish(ids)
        return [self.output.get(request_id, []) for request_id in ids]

    def state(self) -> str:
        return "stuck: " + str(
            [
                (request.request_id, str(request.status), request.num_computed_tokens)
                for request in self.scheduler.requests.values()
            ]
        )

    @property
    def half(self):
        return getattr(self.scheduler.connector, "_scheduler_half", None)

    def failures(self, way: str = "load") -> int:
        return int(sum(value for key, value in self.stats.items() if key.startswith(f"failures:{way}:")))

    def loaded(self) -> int:
        return int(self.stats.get("load_extents", 0))

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def close(self) -> None:
        for rank in self.ranks:
            rank.connector.shutdown()
        self.scheduler.connector.shutdown()
        self.scheduler.kv_event_publisher.shutdown()


ABORTED = RequestStatus.FINISHED_ABORTED
