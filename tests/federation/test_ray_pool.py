"""The remedy for dead simulation workers, on Flower's own pool and a real Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROGRAM = """
import json, os, pathlib, signal, sys
import ray
from flwr.simulation.ray_transport import ray_actor
from heterotune_flwr.federation.simulated import mend_actor_pool

@ray.remote
class Worker:
    def run(self, fn, message, cid, context):
        if message == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return cid, message, context

def answers():
    pool = ray_actor.BasicActorPool(Worker, {"num_cpus": 1}, {})
    pool.add_actors_to_pool(1)
    found = []
    for message in ("hello", "die", "one", "two"):
        future = pool.submit(lambda a, f, m, c, s: a.run.remote(f, m, c, s), (None, message, "7", None))
        try:
            found.append(pool.fetch_result_and_return_actor_to_pool(future)[0])
        except Exception as error:
            found.append(type(error).__name__)
            pool.add_actor_back_to_pool(future)
    assert pool.num_actors == len(pool.pool) == 1
    return found

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
plain = answers()
assert mend_actor_pool() and mend_actor_pool()
pathlib.Path(sys.argv[1]).write_text(json.dumps({"plain": plain, "mended": answers()}))
"""


def test_a_dead_worker_is_replaced_and_without_the_remedy_it_takes_later_messages(tmp_path):
    # A file and not what it prints: Ray prints as well, at times into the middle of a line.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "answers.json")],
        capture_output=True, text=True, timeout=240, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["mended"] == ["hello", "ActorDiedError", "one", "two"]
    # As soon as this fails, Flower has been mended itself and the remedy can go.
    assert answers["plain"] == ["hello", *["ActorDiedError"] * 3]


def test_without_a_simulation_nothing_is_touched():
    program = (
        "from heterotune_flwr.federation.simulated import mend_actor_pool as m; assert m() is False"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
