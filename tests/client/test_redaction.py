"""What a deployed client's errors tell the server: nothing of its data, no path; all of it in its own log."""

from __future__ import annotations

import json
import logging

import pytest
from real_clients import METHOD, World, deployed_node, inline

from heterotune_flwr.client.redaction import told
from heterotune_flwr.errors import BackboneError, DataError
from heterotune_flwr.protocol.messages import DESCRIBE, Header
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.protocol.wire import RemoteError

GOOD = {"text": "patient SECRET", "label": "fruit"}
FILES = {
    "no such column": json.dumps({"patient_name": "SECRET", "diag": "SECRET"}),
    "an answer of its own": json.dumps({"text": "SECRET", "label": "SECRET"}),
    "no JSON": '{"text": "SECRET',
    "no text": json.dumps({"text": [{"role": "user", "content": "SECRET"}], "label": "fruit"}),
    "half a character": '{"text": "SECRET \\ud800", "label": "fruit"}',
    "nested": '{"text": ' + "[" * 100_000 + "]" * 100_000 + ', "label": "fruit"}',
    "too many digits": '{"text": ' + "7" * 5000 + ', "label": "fruit"}',
    "empty": "",
    "none": None,
}


@pytest.mark.parametrize("case", sorted(FILES))
@pytest.mark.parametrize("report", ["all", "counts-and-loss-only"])
def test_errors_about_a_nodes_data_leave_as_their_kind(
    world, folder, tmp_path, caplog, case, report
):
    node = {**deployed_node(folder, tmp_path), "worker": "off", "report": report}
    path = tmp_path / "patients of Dr Smith.jsonl"
    node["data"] = str(path)
    if FILES[case] is not None:
        path.write_text(json.dumps(GOOD) + "\n" + FILES[case] if FILES[case] else "")
    deployed = World(world.path, inline(world), "data.labels=[fruit,engines,music]", **node)
    content = deployed.ask(0, DESCRIBE, DescribeRequest(Header("run", 0, METHOD)).to_content())
    with pytest.raises(RemoteError, match=r"its data|among the labels") as caught:
        DescribeReply.from_content(content)
    line = str(caught.value)
    for private in ("SECRET", "patient", "Smith", str(tmp_path), "/", "diag", ".jsonl"):
        assert private not in line
    assert "worker.log" in line
    full = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert any(path.name in text for text in full)


def test_other_errors_leave_without_paths(tmp_path):
    node = {"client-id": "n1", "state-dir": "/srv/of ours/state", "backbone": "/models/big one"}
    text = (
        "backbone '/models/big one' does not fit 2.00 GB; see /srv/of ours/state/worker.log, \"/a b/c\", ~/x.txt and "
        "/etc/y; https://example.org/z and 1/2 stay"
    )
    assert told(BackboneError(text), node) == (
        "backbone <path> does not fit 2.00 GB; see <state-dir>/worker.log, <path>, <path> and "
        "<path>; https://example.org/z and 1/2 stay"
    ).replace("backbone <path>", "backbone '<backbone>'")
    assert told(BackboneError(text), {"partition-id": 0}) == text
    assert told(DataError(text), {"partition-id": 0}) == text
