"""Shards in an object store: bytes, requests and waiting of an epoch, from the order itself.

The order is a pure function, so which node reads which shard when is not estimated but looked up.
Only time is a model: a node fetches with some connections, each of which waits for the first byte,
and shares its bandwidth among them; all ranks wait for the slowest node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datamodules.stream.order import StreamOrder
from datamodules.stream.prefetch import CONNECTIONS

REQUESTS = 2  # of a shard: its tar and its index, each whole


@dataclass
class StoreConfig:
    """An object store, and what lies in it.

    Attributes:
        latency_ms: From a request to the first byte.
        node_gb_s: Bandwidth from the store to a node, GB/s.
        clip_kb: Size of a stored clip: 160 for `shards build --recipe pretrain` (docs/data.md).
        clips_per_shard: Samples of a tar.
        cache_gb: Room for copies on a node, as `data.cache_gb`.
    """

    latency_ms: float = 50.0
    node_gb_s: float = 1.0
    clip_kb: float = 160.0
    clips_per_shard: int = 1000
    cache_gb: float = 1000.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"store.{name} is {value}; it must be above 0")

    def fetch_s(self, shards: int, num_bytes: float, connections: int) -> float:
        """Time to fetch some shards."""
        waits_s = self.latency_ms / 1e3 * REQUESTS * shards / connections
        return waits_s + num_bytes / (self.node_gb_s * 1e9)


@dataclass(frozen=True)
class Load:
    """What a node reads from one window on.

    Attributes:
        steps: Steps of the window.
        num_bytes: Of all its shards.
        new_bytes: Of those that the window before did not have.
        new_shards: Their number.
    """

    steps: int
    num_bytes: int
    new_bytes: int
    new_shards: int


def node_loads(order: StreamOrder, lanes: range, sizes: Sequence[int], epoch: int) -> list[Load]:
    """Look up what a node with some lanes reads in an epoch."""
    loads, held = [], set[int]()
    for first, end, shards in order.epoch(epoch).needs(lanes):
        mine = set(shards.tolist())
        new = mine - held
        loads.append(
            Load(end - first, sum(sizes[s] for s in mine), sum(sizes[s] for s in new), len(new))
        )
        held = mine
    return loads


def waiting_s(
    nodes: Sequence[Sequence[Load]], step_s: float, store: StoreConfig, connections: int
) -> tuple[float, float]:
    """Time that all ranks wait for shards in an epoch, fetched ahead and on demand.

    Args:
        nodes: Each node's loads.
        step_s: Time of a step that waits for nothing.
        store: The store.
        connections: Fetches at a time on demand: the loader workers of a node.
    """
    ahead_s = demand_s = now = 0.0
    ends: list[float] = []  # of windows, with fetching ahead
    fetched = [0.0] * len(nodes)
    for w in range(len(nodes[0])):
        loads = [node[w] for node in nodes]
        demand_s += max(store.fetch_s(x.new_shards, x.new_bytes, connections) for x in loads)
        for n, load in enumerate(loads):
            first = _first_held(nodes[n], w, store.cache_gb * 1e9)
            begin = max(fetched[n], ends[first - 1] if first else 0.0)
            fetched[n] = begin + store.fetch_s(load.new_shards, load.new_bytes, CONNECTIONS)
        start = max(now, *fetched)
        ahead_s += start - now
        now = start + loads[0].steps * step_s
        ends.append(now)
    return ahead_s, demand_s


def _first_held(node: Sequence[Load], window: int, limit: float) -> int:
    """The earliest window whose shards the cache holds beside those of all up to a later one.

    A window is taken to be fetched as a whole, once all before this one are over.
    """
    total = float(node[window].num_bytes)
    while window and total + node[window - 1].num_bytes <= limit:
        window -= 1
        total += node[window].num_bytes
    return window


def plan_store(
    num_samples: int,
    batch: int,
    ranks: int,
    ranks_per_node: int,
    step_s: float,
    workers: int,
    store: StoreConfig,
) -> dict[str, Any]:
    """Compute an epoch over an object store.

    Args:
        num_samples: Of an epoch.
        batch: Global batch.
        ranks: GPUs in all.
        ranks_per_node: GPUs of a node.
        step_s: Time of a step that waits for nothing.
        workers: Loader processes a rank.
        store: The store.

    Raises:
        ValueError: The ranks cannot share the batch.
    """
    full, rest = divmod(num_samples, store.clips_per_shard)
    counts = [store.clips_per_shard] * full + [rest] * bool(rest)
    sizes = [round(count * store.clip_kb * 1000) for count in counts]
    order = StreamOrder(counts, global_batch_size=batch)
    order.check_parts(ranks)
    each = order.lanes // ranks * ranks_per_node
    nodes = [
        node_loads(order, range(first, first + each), sizes, 0)
        for first in range(0, order.lanes, each)
    ]
    in_use = max(load.num_bytes for node in nodes for load in node)
    fetched = sum(load.new_bytes for node in nodes for load in node)
    copies = sum(load.new_shards for node in nodes for load in node)
    ahead_s, demand_s = waiting_s(nodes, step_s, store, max(1, workers) * ranks_per_node)
    epoch_s = order.num_steps * step_s
    busy_s = store.fetch_s(1, sizes[0], CONNECTIONS)
    return {
        **asdict(store),
        "nodes": len(nodes),
        "step_s": step_s,
        "epoch_s": epoch_s,
        "set_bytes": sum(sizes),
        "fetched_bytes": fetched,
        "in_use_bytes": in_use,
        "fits": in_use <= store.cache_gb * 1e9,
        "requests": REQUESTS * copies,
        "requests_per_s": REQUESTS * copies / epoch_s,
        "peak_requests_per_s": REQUESTS * len(nodes) / busy_s,
        "needed_gb_s": fetched / len(nodes) / epoch_s / 1e9,
        "wait_ahead_s": ahead_s,
        "wait_on_demand_s": demand_s,
    }


def describe_store(plan: dict[str, Any]) -> list[str]:
    """Lay it out as text."""
    lines = [
        f"shards in a store ({plan['latency_ms']:g} ms, {plan['node_gb_s']:g} GB/s a node, "
        f"{plan['nodes']} nodes, steps of {plan['step_s']:.2f} s), an epoch of "
        f"{plan['epoch_s'] / 3600:.2f} h:",
        f"  {plan['fetched_bytes'] / 1e12:.2f} TB fetched of a set of "
        f"{plan['set_bytes'] / 1e12:.2f} TB, {plan['needed_gb_s']:.3f} GB/s a node",
        f"  {plan['requests']} requests, {plan['requests_per_s']:.1f} a second on average, "
        f"{plan['peak_requests_per_s']:.0f} while all nodes fetch",
        f"  a node reads from {plan['in_use_bytes'] / 1e9:.0f} GB of shards at a time",
    ]
    if not plan["fits"]:
        lines.append("  which data.cache_gb does not hold: each is fetched again and again")
        return lines
    for key, how in (("ahead", "fetched ahead"), ("on_demand", "fetched when asked for")):
        wait_s = plan[f"wait_{key}_s"]
        share = wait_s / (wait_s + plan["epoch_s"])
        lines.append(f"  {how + ':':<24}{wait_s:9.0f} s of waiting, {share:.1%} of the epoch")
    return lines
