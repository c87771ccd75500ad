"""Coverage-guided fuzzing of everything that reads what a stranger sent (atheris, on libFuzzer).

Each input becomes a packed record (free manifest, free array headers, free data under a good manifest, or a good record
with bytes replaced) or a whole message; see :mod:`.fuzz_target` for what is asserted. Every 32nd input is also
measured for memory. A finding ends the run with its input in a file and exit code 1.

Run: ``pip install -e '.[fuzz]'; python -m benchmarks.reliability.fuzz_exchange`` (1,000,000 inputs). Adds ``fuzz_*``
to ``codec.json``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_COUNTS = "HETEROTUNE_FUZZ_COUNTS"


def child(options: list[str]) -> None:
    """The fuzzing process: instruments the readers, then never returns."""
    try:
        import atheris
    except ImportError as error:
        raise SystemExit("atheris is missing: pip install -e '.[fuzz]'") from error
    readers = [
        "heterotune_flwr.exchange",
        "heterotune_flwr.protocol",
        "heterotune_flwr.channels",
        "heterotune_flwr.federation",
        "json",
        "benchmarks.reliability.fuzz_target",
    ]
    with atheris.instrument_imports(include=readers):
        from benchmarks.reliability import fuzz_target

    path = Path(os.environ[_COUNTS])

    def one_input(data: bytes) -> None:
        fuzz_target.check(data, measure=fuzz_target.counts["inputs"] % 32 == 0)
        if fuzz_target.counts["inputs"] % 1000 == 0:
            path.write_text(json.dumps(fuzz_target.counts))

    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


def main() -> None:
    # Here: the child's readers are instrumented before anything imports them.
    from benchmarks.reliability.fuzz_target import seeds
    from benchmarks.runner import arguments, say, write_results

    parser = arguments(__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="heterotune-fuzz-") as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        for index, data in enumerate(seeds()):
            (corpus / f"{index:04d}").write_bytes(data)
        begin = time.monotonic()
        command = [
            sys.executable, "-m", "benchmarks.reliability.fuzz_exchange", "--child", f"-atheris_runs={args.inputs}",
            f"-seed={args.seed}", "-max_len=4096", "-rss_limit_mb=2048", "-timeout=10", "-verbosity=1",
            "-artifact_prefix=fuzz-finding-", str(corpus),
        ]  # fmt: skip
        environment = {**os.environ, _COUNTS: str(folder / "counts.json")}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        counts = json.loads((folder / "counts.json").read_text())
        kept = len(list(corpus.iterdir()))
    seconds = time.monotonic() - begin
    edges = [int(n) for n in re.findall(r"cov: (\d+)", done.stderr)]
    say(done.stderr[-2000:], counts, f"{seconds:.0f} s, exit code {done.returncode}")
    # A finding ends libFuzzer before it says that it is done.
    if f"Done {args.inputs} in" not in done.stderr:
        raise SystemExit(1)
    values = {
        "fuzz_inputs": counts["inputs"], "fuzz_accepted": counts["accepted"],
        "fuzz_measured": counts["measured"], "fuzz_findings": 0, "fuzz_edges": max(edges, default=0),
        "fuzz_corpus": kept, "fuzz_seconds": round(seconds), "fuzz_seed": args.seed,
    }  # fmt: skip
    if args.inputs >= 1_000_000:  # fewer are a try
        write_results("codec", values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
