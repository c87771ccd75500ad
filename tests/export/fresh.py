"""Processes without this one's state that run programs one after another: large libraries are imported once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

_LOOP = """
import json, sys, traceback
told, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    program, arguments = json.loads(line)
    names = {"arguments": arguments}
    try:
        exec(program, names)
        said = {"answer": names["answer"]}
    except BaseException:
        said = {"error": traceback.format_exc()}
    print(json.dumps(said), file=told, flush=True)
"""


class Fresh:
    """A Python process of its own, until the end of the ``with`` block; ``folder`` takes what it prints."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "fresh.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=folder,
        )  # fmt: skip

    def __enter__(self) -> Fresh:
        return self

    def run(self, program: str, *arguments: object) -> Any:
        """Run a program that reads ``arguments`` (words) and sets ``answer`` (JSON); AssertionError where it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(
            json.dumps([program, [str(word) for word in arguments]]),
            file=self.process.stdin,
            flush=True,
        )
        said = json.loads(self.process.stdout.readline() or '{"error": "the process is gone"}')
        assert "error" not in said, said["error"]
        return said["answer"]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()
