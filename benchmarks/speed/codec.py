"""What smaller numbers on the wire cost: the demo's federation with every codec, HeteroTune alone, in this process.

The ``demo`` preset as it is (12 clients of three embedded types, 30 rounds, HeteroTune at its own rate) with the
profiles of ``conf/exchange`` and their parts: real client app, real messages, no Flower processes. Bytes are those
of the messages' contents per client-round; for an open-text bank (r = 128, q = 32, E = 3, output by vocabulary) the
same messages are built and counted. Differences of accuracy are paired over (seed, type) cells.

Run: ``python -m benchmarks.speed.codec`` (about 6 minutes on one core after the states are cached; ``--settings tiny``
for a part of it). ``python -m benchmarks.reliability.fuzz_exchange`` adds its rows to the same file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.runner import (
    SEEDS,
    Key,
    arguments,
    by_client,
    mean_and_std,
    paired_gain,
    read_results,
    say,
    seed_means,
    write_results,
)
from client_app.app import app
from heterotune_flwr.client.received import TensorCache
from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.exchange.directions import down_codec, exact_codec, up_codec
from heterotune_flwr.exchange.packing import content_bytes
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.resend import Resend
from heterotune_flwr.protocol.messages import EvaluateRequest, Header, TrainReply, TrainRequest
from heterotune_flwr.schema import ExchangeConfig, MethodConfig
from heterotune_flwr.tuning.client_state import ClientStore

PROFILES = ("bf16", "tiny", "int8", "topk")


def _profile(name: str, **changes: Any) -> dict[str, Any]:
    values = yaml.safe_load((conf_root() / "exchange" / f"{name}.yaml").read_text())["exchange"]
    return {**values, **changes}


def settings() -> dict[str, dict[str, Any]]:
    """Row -> fields of ``exchange``: the profiles, then what error feedback is worth."""
    rows = {name: _profile(name) for name in PROFILES}
    for name in ("tiny", "topk"):
        rows[f"{name}_no_feedback"] = _profile(name, error_feedback=False)
    return rows


def run_demo(exchange: dict[str, Any], seeds: list[int], folder: Path) -> dict[str, Any]:
    """One run of the demo in this process; its results as ``results.json`` has them."""
    words = [f"exchange.{key}={value}" for key, value in exchange.items()]
    words += [
        f"run.seeds={seeds}".replace(" ", ""),
        "'strategies.bank={_component_: heterotune_flwr.strategies.HeteroTune}'",
        "run.compare=[bank]",
        f"run.dir={folder}",
    ]
    config = compose("demo", words)
    count = sum(item.clients for item in config.types)
    nodes = [{"partition-id": i, "num-partitions": count} for i in range(count)]
    grid = InProcessGrid(app, nodes, {"config": "demo", "overrides": " ".join(words)})
    return run_strategies(grid, config, Journal(folder), "codec")


def open_text_bytes(exchange: ExchangeConfig) -> tuple[int, int]:
    """Bytes down and up of one client-round with the default bank and output by vocabulary."""
    method = MethodConfig(output=MethodConfig().latent)
    values = initial_tensors(bank_shapes(method, method.latent), 0)
    request = TrainRequest(
        Header("run-heterotune-seed0", 0, method, 10),
        values,
        64 * "f",
        None,
        sorted(values),
    )
    names = (
        "examples", "steps", "learning_rate", "loss", "seconds", "accuracy", "peak_memory_mb",
    )  # fmt: skip
    metrics = dict.fromkeys(names, 1.0)
    reply = TrainReply(
        "client-0001", "backbone@nf4", 10, 64 * "f", values, metrics, cache_digest=64 * "f"
    )
    down = request.to_content(down_codec(exchange), exact_codec(exchange))
    return content_bytes(down), content_bytes(reply.to_content(up_codec(exchange)))


def row_of(results: dict[str, Any], exchange: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, bytes and bytes of the open-text bank."""
    mean, std = mean_and_std(seed_means(by_client(results, "bank")))
    counted = [run["bytes"] for run in results["runs"]]
    down, up = open_text_bytes(ExchangeConfig(**exchange))
    evaluated = np.mean([b["evaluate_down"] for b in counted])
    return {
        "exchange": exchange,
        "accuracy": mean,
        "accuracy.std": std,
        "bytes_down": round(float(np.mean([b["down_per_client_round"] for b in counted]))),
        "bytes_up": round(float(np.mean([b["up_per_client_round"] for b in counted]))),
        "evaluate_down": round(float(evaluated)),
        "open_text_bytes_down": down,
        "open_text_bytes_up": up,
    }


def resend_milliseconds(repeats: int = 100) -> float:
    """What ``exchange.resend=changed`` adds to a message of the open-text bank, server and client together (median).

    Half of the messages carry every tensor (which the client writes down), half name all of them as held.
    """
    exchange, method = ExchangeConfig(), MethodConfig(output=MethodConfig().latent)
    values = initial_tensors(bank_shapes(method, method.latent), 0)
    server = Resend(exchange)
    taken = []
    with tempfile.TemporaryDirectory(prefix="heterotune-resend-") as folder:
        store = ClientStore(Path(folder), "run", "client")
        for index in range(repeats):
            if index % 2 == 0:
                values = {name: value + np.float32(0.01) for name, value in values.items()}
            whole = EvaluateRequest(Header("run", 0, method, 1), values, "", None, ["global"])
            begin = time.perf_counter()
            request = server.without_held("client", whole)
            middle = time.perf_counter()
            received = EvaluateRequest.from_content(request.to_content("bf16"))
            arrived = time.perf_counter()
            _, kept = TensorCache.of(store, exchange).complete(received)
            server.confirm("client", kept)
            taken.append(middle - begin + time.perf_counter() - arrived)
            assert bool(request.cached.names) == (index % 2 == 1)
    return round(1e3 * float(np.median(taken)), 2)


def _largest(row: dict[str, Any]) -> int:
    kinds = ("bytes_down", "bytes_up", "open_text_bytes_down", "open_text_bytes_up")
    return max(int(row[kind]) for kind in kinds)


def summary(rows: dict[str, Any], found: dict[str, dict[Key, float]]) -> dict[str, Any]:
    """The flat keys: bytes of the larger way, and what ``tiny`` loses against the default."""
    flat: dict[str, Any] = {}
    for name in ("bf16", "tiny"):
        if name in rows:
            flat[{"bf16": "default_bytes"}.get(name, "tiny_bytes")] = _largest(rows[name])
    if "bf16" in found:
        for name in found.keys() - {"bf16"}:
            rows[name]["loss_against_bf16"] = paired_gain(found["bf16"], found[name])
        if "tiny" in found:
            flat["tiny_accuracy_drop_points"] = rows["tiny"]["loss_against_bf16"]["gain"]
    return flat


def main() -> None:
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--settings", nargs="*", choices=[*settings()], default=list(settings()))
    args = parser.parse_args()
    write_results("codec", {"resend_ms": resend_milliseconds(), "seeds": args.seeds})
    known = read_results("codec")
    rows: dict[str, Any] = known.get("settings", {})
    found = {name: _cells(values) for name, values in known.get("per_client", {}).items()}
    for name in args.settings:
        exchange = settings()[name]
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="heterotune-codec-") as folder:
            results = run_demo(exchange, args.seeds, Path(folder))
        found[name] = by_client(results, "bank")
        rows[name] = row_of(results, exchange)
        rows[name]["seconds"] = round(time.monotonic() - begin, 1)
        say(name, rows[name])
        flat = summary(rows, found)
        kept = {
            name: {"|".join(map(str, key)): round(value, 3) for key, value in values.items()}
            for name, values in found.items()
        }
        write_results("codec", {**flat, "seeds": args.seeds, "settings": rows, "per_client": kept})


def _cells(values: dict[str, float]) -> dict[Key, float]:
    """Per-client accuracies as they are kept -> by (seed, type, client)."""
    cells = {}
    for text, value in values.items():
        seed, type_key, client = text.split("|")
        cells[int(seed), type_key, client] = value
    return cells


if __name__ == "__main__":
    main()
