import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch

from verippo.core.training import dist

COLLECTIVES = """
import json, sys, threading
import torch
from verippo.core.training import dist

dist.init(timeout_seconds=60)
with dist.fail_together():
    rank = dist.rank()
    found = {
        "world_size": dist.world_size(),
        "is_main": dist.is_main(),
        "all_gather": dist.all_gather({"rank": rank, "text": "x" * (1 + 1000 * rank)}),
        "broadcast": dist.broadcast(["from", rank]),
        "all_sum": dist.all_sum(torch.tensor([1.0 + rank, 10.0])).tolist(),
        "all_max": dist.all_max(torch.tensor([1.0 + rank, -rank])).tolist(),
    }
    dist.barrier()
    with open(f"{sys.argv[1]}/found-{rank}.json", "w") as file:
        json.dump(found, file)
assert not [thread for thread in threading.enumerate() if thread.daemon], "a daemon thread at exit may abort the process"
"""
FAILING = """
import sys, time
from verippo.core.training import dist

dist.init(timeout_seconds=600)
with dist.fail_together():
    if dist.rank() == int(sys.argv[1]):
        time.sleep(1)
        raise ValueError("row 17 is broken")
    dist.barrier()  # in which it would wait for ten minutes
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def found(two_ranks, tmp_path_factory):
    """What each of two ranks saw of every collective."""
    folder = tmp_path_factory.mktemp("collectives")
    (folder / "script.py").write_text(COLLECTIVES)
    done = two_ranks(str(folder / "script.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_exchange_values_in_rank_order(found):
    assert [part.pop("is_main") for part in found] == [True, False]
    for part in found:
        assert part["world_size"] == 2
        assert part["all_gather"] == [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 1001}]
        assert part["broadcast"] == ["from", 0]
        assert part["all_sum"] == [3.0, 20.0]
        assert part["all_max"] == [2.0, 0.0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_raises_brings_the_other_down_with_its_reason(tmp_path, failing):
    """Started as srun would: no launcher stands by to end the other rank."""
    (tmp_path / "script.py").write_text(FAILING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }
        command = [sys.executable, str(tmp_path / "script.py"), str(failing)]
        ranks.append(
            subprocess.Popen(
                command, env=env | {"MASTER_PORT": str(port)}, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        start = time.perf_counter()
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
        seconds = time.perf_counter() - start
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert seconds < 60
    assert "ValueError: row 17 is broken" in errors[failing]
    assert (
        f"verippo: rank {1 - failing} stops: rank {failing}: ValueError: row 17 is broken"
        in errors[1 - failing]
    )


def test_alone_every_collective_is_the_identity():
    assert dist.world_size() == 1
    assert dist.rank() == 0
    assert dist.is_main()
    assert dist.all_gather({"a": 1}) == [{"a": 1}]
    assert dist.broadcast("x") == "x"
    assert dist.all_sum(torch.tensor([2.0])).tolist() == [2.0]
    assert dist.all_max(torch.tensor([2.0])).tolist() == [2.0]
    with pytest.raises(KeyError), dist.fail_together():
        raise KeyError


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
            "MASTER_ADDR, MASTER_PORT",
        ),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, environment, missing):
    monkeypatch.setattr(dist.td, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(
        ValueError,
        match=f"RANK is set but {missing} is not: start with deepspeed, torchrun or srun",
    ):
        dist.init()


JOINING = """
import sys
import torch
import torch.distributed.distributed_c10d as c10d

address, port, world_size, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = torch.distributed.TCPStore(address, port, world_size, is_master=False)
group, _ = c10d._new_process_group_helper(
    world_size, 1, [], c10d.Backend("gloo"), c10d.PrefixStore(name, store), group_name=name, timeout=c10d.default_pg_timeout
)
c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
for shape in ((2, 3), (4,)):
    tensor = torch.empty(shape)
    torch.distributed.broadcast(tensor, src=0, group=group)
    print(tensor.flatten().tolist())
"""


def test_a_process_outside_the_run_joins_an_outer_group_by_address_and_gets_what_is_sent():
    dist.init()
    group = dist.OuterGroup(
        address="127.0.0.1", port=0, world_size=2, name="outer", timeout_seconds=60
    )
    place = [group.address, str(group.port), "2", "outer"]
    with subprocess.Popen(
        [sys.executable, "-c", JOINING, *place], stdout=subprocess.PIPE, text=True
    ) as child:
        group.join()
        group.send([torch.arange(6.0).reshape(2, 3), torch.ones(4)])
        assert child.communicate(timeout=60)[0].splitlines() == [
            "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]",
            "[1.0, 1.0, 1.0, 1.0]",
        ]
    group.leave()
    assert dist.world_size() == 1


def test_an_outer_group_that_nobody_joins_gives_up_after_its_time_out():
    dist.init()
    group = dist.OuterGroup(
        address="127.0.0.1", port=0, world_size=2, name="lonely", timeout_seconds=1
    )
    with pytest.raises(RuntimeError):
        group.join()


HANGING_STORE = """
import sys, time
from verippo.core.training.watchdog import Watchdog, enter_phase

class Store:
    def set(self, *_):
        time.sleep(600)  # as when the host cannot be reached

enter_phase("score")
hosts = ["host a, 10.0.0.1", "host b, 10.0.0.2"]
Watchdog(Store(), rank=int(sys.argv[1]), hosts=hosts, limit_seconds=1.0, poll_seconds=0.1).start()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        # this one has no connection to rank 0, which serves the store
        (1, r"sign of life for \d+ s from rank 0 \(host a, 10\.0\.0\.1; last in phase load\)"),
        # a launcher serves it
        (0, r"answer for \d+ s from the store of the ranks.* on this host \(host a, 10\.0\.0\.1\)"),
    ],
)
def test_store_that_never_answers_ends_the_rank(rank, reason):
    """So both sides of a cut link end."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING_STORE, str(rank)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.fullmatch(
        rf"\n?verippo: rank {rank} stops: no {reason}.*: stopped.* killed.*: check that host and "
        "the network, then run the same command again to resume\n",
        done.stderr,
    ), done.stderr


UNPUBLISHED = """
import time
from verippo.core.training.watchdog import Failure, Watchdog

class Store:
    set = check = lambda *_: None
    def compare_set(self, *_):
        time.sleep(600)  # the link was cut a moment ago

hosts = ["host a, 10.0.0.1", "host b, 10.0.0.2"]
watchdog = Watchdog(Store(), rank=1, hosts=hosts, limit_seconds=60.0, poll_seconds=0.1)
watchdog.start()
error = RuntimeError("no server is left")
watchdog.done.set()
assert not watchdog.publish(Failure(str(error)))
watchdog.end_cut_off(error)
"""


def test_error_that_cannot_be_published_names_the_lost_host():
    """Such as that of a sampler behind the link that was cut."""
    done = subprocess.run(
        [sys.executable, "-c", UNPUBLISHED], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"verippo: rank 1 stops: no sign of life for \d+ s from rank 0 \(host a, 10\.0\.0\.1; "
        r"last in phase load\): .* \(RuntimeError: no server is left\)\n",
        done.stderr,
    ), done.stderr
