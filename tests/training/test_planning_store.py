"""An epoch over an object store: what is fetched is the order's, and waiting as drawn by hand."""

import json

import pytest

from datamodules.stream.order import StreamOrder
from lightning_modules.cli.plan import main
from lightning_modules.planning.store import Load, StoreConfig, node_loads, plan_store, waiting_s


def test_a_node_fetches_what_its_lanes_read():
    order = StreamOrder([7, 9, 4, 12, 8, 5, 15, 20], global_batch_size=8, lanes=4, window=6)
    sizes = [100 + k for k in range(8)]
    for lanes in (range(2), range(2, 4)):
        loads = node_loads(order, lanes, sizes, 1)
        read, held, fetched = [], set(), 0
        for step in range(order.num_steps):
            slots = order.epoch(1).batch(step)
            read.append(
                {s for s, lane in zip(slots.shard, slots.lane, strict=True) if lane in lanes}
            )
        place = 0
        for load in loads:
            mine = set().union(*read[place : place + load.steps])
            assert load.num_bytes == sum(sizes[s] for s in mine)
            fetched += sum(sizes[s] for s in mine - held)
            held, place = mine, place + load.steps
        assert sum(load.new_bytes for load in loads) == fetched and place == order.num_steps


def test_waiting_as_drawn_by_hand():
    # 1 GB/s, no latency to speak of: 2 GB a window take 2 s, a window's steps 3 s
    store = StoreConfig(latency_ms=1e-9, node_gb_s=1.0, cache_gb=4.0)
    quick = [Load(3, 2 * 10**9, 2 * 10**9, 10)] * 3
    # ahead: only the first is waited for; on demand: each is
    assert waiting_s([quick], 1.0, store, 64) == pytest.approx((2.0, 6.0))
    # 4 GB take 4 s, and beside 4 GB no other window fits: each is fetched when the last is over
    slow = [Load(3, 4 * 10**9, 4 * 10**9, 10)] * 3
    assert waiting_s([slow], 1.0, store, 64) == pytest.approx((12.0, 12.0))
    # with room: 0-4 fetch, 4-7 read, 4-8 fetch, 8-11 read, 8-12 fetch: 4 + 1 + 1
    roomy = StoreConfig(latency_ms=1e-9, node_gb_s=1.0, cache_gb=100.0)
    assert waiting_s([slow], 1.0, roomy, 64) == pytest.approx((6.0, 12.0))
    # all wait for the slowest node
    assert waiting_s([slow, quick], 1.0, roomy, 64) == pytest.approx((6.0, 12.0))
    # 10 shards of 2 requests at 0.1 s over 8 connections ahead, over 2 on demand
    late = StoreConfig(latency_ms=100.0, node_gb_s=1e9, cache_gb=100.0)
    assert waiting_s([quick], 1.0, late, 2) == pytest.approx((0.25, 3.0))


def test_512_ranks_over_35_million_samples():
    shape = {"num_samples": 35_000_000, "batch": 8192, "ranks": 512, "ranks_per_node": 8}
    plan = plan_store(**shape, step_s=1.0, workers=8, store=StoreConfig())
    assert plan["nodes"] == 64 and plan["set_bytes"] == 5_600_000_000_000
    assert 1.0 <= plan["fetched_bytes"] / plan["set_bytes"] < 1.2
    assert plan["fits"] and plan["wait_ahead_s"] < plan["wait_on_demand_s"]
    small = plan_store(**shape, step_s=1.0, workers=8, store=StoreConfig(cache_gb=10.0))
    assert not small["fits"]
    with pytest.raises(ValueError, match="must be above 0"):
        StoreConfig(node_gb_s=0)


def test_the_command_shows_it(tmp_path, capsys):
    words = ["--config", "configs/pretrain/eva02_at_base_egoclip.yaml", "--data_dir=/data"]
    words += ["--clips=35000000", "--cluster.nodes=64", "--data.global_batch_size=8192"]
    assert main([*words, "--store.latency_ms=20", f"--json={tmp_path}/p.json"]) == 0
    told = capsys.readouterr().out
    assert "shards in a store (20 ms, 1 GB/s a node, 64 nodes" in told
    assert "fetched ahead:" in told and "fetched when asked for:" in told
    assert json.loads((tmp_path / "p.json").read_text())["store"]["nodes"] == 64
