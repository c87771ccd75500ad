"""A deployment under attack and under fire, against the simulation of the same clients.

* *Refusals*: keys, certificates, connections and paths that must not get in (:mod:`benchmarks.refusals`), and an app
  whose code the nodes have not installed.
* *Equality*: the final bank of a deployment over TLS with node authentication against that of the simulation with the
  same seeds and the same examples per client.
* *Kills*: SIGKILL of one process of the deployment, while no run goes on or while clients train, upload, or the server
  aggregates (:mod:`benchmarks.kills`); what the systemd units would start again is started again after as long as they
  wait. A run counts as completed when Flower says so, all its rounds are there once and in order, and none counts an
  answer twice; after the death of the ServerApp, or of the SuperExec (with which Flower ends its ServerApps), it is
  resumed. Where no process of the kind lives at the moment there is no case (``killed`` is false).

Run: ``python -m benchmarks.deployment`` (about an hour on 2 cores; nginx is used if it is there). Writes
``benchmarks/results/deployment.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import read_results, write_results
from benchmarks.kills import CASES, VICTIM, kill_case
from benchmarks.lab import Lab, end_on_sigterm, has_nginx
from benchmarks.lab_run import (
    NODES,
    configuration,
    final_bank,
    greatest_difference,
    join,
    simulated_bank,
)
from benchmarks.refusals import node_refusals, proxy_refusals
from heterotune_flwr.federation.staging import stage_app


def foreign_code(lab: Lab, folder: Path) -> bool:
    """Whether an app whose code the nodes have not installed is refused by all of them, and they stay online."""
    app = stage_app(folder / "foreign")
    with (app / "heterotune_flwr" / "errors.py").open("a") as stream:
        stream.write("# another version\n")
    verdict = lab.await_end(lab.submit(app, config=configuration(folder / "refused")))
    status = (folder / "refused" / "status.json").read_text()
    told = "install the server's version on the node" in status
    return verdict == "finished:failed" and told and lab.online() == set(NODES)


def attacked(lab: Lab, app: Path, folder: Path, simulated: dict[str, Any]) -> dict[str, Any]:
    """Refusals, then a run and its difference from the simulation."""
    refused = node_refusals(lab, folder, VICTIM, "stranger")
    if lab.proxy:
        refused |= {f"proxy: {path}": ok for path, ok in proxy_refusals(lab).items()}
    refused["code that is not installed"] = foreign_code(lab, folder)
    print(refused, flush=True)
    verdict = lab.await_end(lab.submit(app, config=configuration(folder / "equal")))
    difference = greatest_difference(final_bank(folder / "equal"), simulated)
    print(f"equality: {verdict}, greatest difference {difference}", flush=True)
    return {
        "refusal_cases": len(refused),
        "refused": sum(refused.values()),
        "refusals": refused,
        "sim_equals_deploy": difference,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the runs with a death")
    parser.add_argument("--kills", nargs="*", help="nothing but these, like SuperLink-train")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="heterotune-lab-") as name:
        folder = Path(name)
        config, simulated = simulated_bank(folder / "simulated")
        _, undisturbed = simulated_bank(folder / "undisturbed", options.rounds)
        with Lab(folder, [*NODES, "stranger"], proxy=has_nginx()) as lab:
            lab.configure("stranger", client_id="stranger")
            lab.deployment.nodes["stranger"].revoked = True
            join(lab, config, books=folder / "books")
            app = stage_app(folder / "app")
            values = {} if options.kills else attacked(lab, app, folder, simulated)
            rows = {
                "-".join(case): kill_case(lab, app, folder, case, options.rounds, undisturbed)
                for case in CASES
                if not options.kills or "-".join(case) in options.kills
            }
    rows = {**read_results("deployment").get("kills", {}), **rows}
    counted = [row for row in rows.values() if row["killed"]]
    values |= {
        "proxy": has_nginx(),
        "kill_cases": len(counted),
        "completed": sum(row["completed"] for row in counted),
        "kill_next_round_s_worst": max(row["next_round_s"] for row in counted if row["completed"]),
        "kills": rows,
    }
    write_results("deployment", values)


if __name__ == "__main__":
    main()
