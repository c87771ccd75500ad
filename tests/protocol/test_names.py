"""Ids and other people's words: one definition, refused at the boundary, harmless wherever they are shown."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace

import pytest
from rich.console import Console
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.flower import Message
from heterotune_flwr.names import as_id, is_file_name, is_id, is_label, printable, safe_text
from heterotune_flwr.protocol.messages import DESCRIBE, EVALUATE, TRAIN, EvaluateReply, TrainReply
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.protocol.wire import RemoteError, error_content, read_config
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.status import Standing, follow, render
from heterotune_flwr.reporting.tables import final_table
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.worker.server import Printable

ESC = "\x1b]0;pwned\x07\x1b[2J"
NO_IDS = {
    "escape sequence": ESC + "x",
    "markup": "[bold]x[/nope]",
    "path": "../../out/x@fp32",
    "separator": "a/b",
    "NUL": "a\x00b",
    "newline": "a\nb",
    "last newline": "a\n",
    "5 MB": "x" * 5_000_000,
    "65 letters": "x" * 65,
    "empty": "",
    "space": "a b",
    "plus": "a+b",
    "other digits": "a\u0663",
    "other letters": "клиника",
    "direction": "a\u202eb",
    "hidden file": ".a",
    "option": "-a",
    "state of another part": "a~residual",
}


@pytest.mark.parametrize("case", sorted(NO_IDS))
def test_what_is_no_id_is_none_on_either_side(case, tmp_path):
    text = NO_IDS[case]
    assert not is_id(text)
    assert is_id(as_id(text))
    node = {"client-id": text, "backbone": "tiny-a", "data": "d", "state-dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="client-id") as caught:
        identify(compose("demo"), node)
    assert len(str(caught.value)) < 500
    if case != "65 letters":
        assert not is_file_name(text)
        with pytest.raises(ExchangeError) as refused:
            ClientStore(tmp_path, text, "client")
        assert len(str(refused.value)) < 300
    with pytest.raises(RemoteError) as remote:
        read_config(error_content(text or "-", text, text))
    assert (remote.value.kind, remote.value.client_id) == ("failed", "")
    assert len(str(remote.value)) < 1100
    assert str(remote.value).isprintable()


def test_types_are_named_by_ids_whatever_a_backbone_is_called():
    names = {
        "org/Model-1.5B": "Model-1.5B@nf4",
        "/models/big one": "big-one@nf4",
        "/models/a+b.gguf": "a-b@nf4",
    }
    for source, key in names.items():
        assert BackboneSpec(source, "nf4").type_key == key
    pinned = BackboneSpec("HuggingFaceTB/SmolLM2-135M-Instruct", "bf16", "0" * 40).type_key
    assert is_id(pinned)
    assert pinned.endswith("@bf16")
    assert BackboneSpec("m", "bf16", "refs/pr/1").type_key == "m#refs-pr-1@bf16"
    others = {
        BackboneSpec(f"/m/{name}", "nf4").type_key
        for name in ("модель", "другая", "x" * 99, "x" * 98)
    }
    assert len(others) == 4
    assert all(map(is_id, others))


def test_labels_are_texts_of_any_script_without_control():
    assert all(map(is_label, ("fruit", "红苹果。", "नमस्\u200dते", "می\u200cخواهم", "a b", "😀", "")))
    assert not any(
        map(is_label, ("a\nb", ESC, "a\u202eb", "\u2066a", "x" * 1001, "\ud800", "a\u2028b"))
    )


def test_shown_text_keeps_its_letters_and_loses_what_a_terminal_obeys():
    assert safe_text(f"{ESC}a\r\n\tb \u202ec नमस्\u200dते") == "?]0;pwned??[2Ja b ?c नमस्\u200dते"
    assert safe_text("y" * 5_000_000) == "y" * 300 + " ..."
    assert safe_text(" \n" * 5_000_000 + "y") == " ..."
    assert printable("a\n\tb\x9b31m") == "a\n\tb?31m"


def lies():
    """What one node of six does, by message: a reply made of the honest one."""
    for case in ("escape sequence", "markup", "path", "NUL", "5 MB", "direction"):
        text = NO_IDS[case]
        yield f"client id: {case}", DESCRIBE, DescribeReply, {"client_id": text}
        yield f"type: {case}", DESCRIBE, DescribeReply, {"type_key": text, "fingerprint": "e" * 16}
    yield "fingerprint", DESCRIBE, DescribeReply, {"fingerprint": ESC}
    yield "code", DESCRIBE, DescribeReply, {"code_hash": "[/x]"}
    yield "bits", DESCRIBE, DescribeReply, {"bits": ESC}
    yield "label", DESCRIBE, DescribeReply, {"labels": [ESC, "b"]}
    yield "long label", DESCRIBE, DescribeReply, {"labels": ["x" * 2_000_000, "b"]}
    yield "tensor", DESCRIBE, DescribeReply, {"shapes": {ESC: (1,)}}
    yield "long tensor", DESCRIBE, DescribeReply, {"shapes": {"x" * 2_000_000: (1,)}}
    yield "trains as another", TRAIN, TrainReply, {"client_id": "[/x]"}
    yield "trains as a path", TRAIN, TrainReply, {"type_key": "../x"}
    yield "metric", TRAIN, TrainReply, {"metrics": {ESC: 1.0}}
    yield "long metric", TRAIN, TrainReply, {"metrics": {"m" * 1_000_000: 1.0}}
    yield "digest", TRAIN, TrainReply, {"maps_digest": ESC}
    yield "tests as another", EVALUATE, EvaluateReply, {"client_id": ESC}
    yield "kept", EVALUATE, EvaluateReply, {"cache_digest": ESC}


@pytest.mark.parametrize(
    ("kind", "reads", "lie"), [pytest.param(*lie[1:], id=lie[0]) for lie in lies()]
)
def test_one_hostile_node_is_left_out_with_a_reason_and_the_run_goes_on(
    tmp_path, caplog, kind, reads, lie
):
    spec = {"_component_": "heterotune_flwr.strategies.within_type.WithinType"}
    config = toy_config(tmp_path, (2, 2, 0), {"within_type": spec}, min_clients=2, rounds=1)
    inner = ToyFederation(config).app()

    def app(message, context):
        reply = inner(message, context)
        if context.node_config["partition-id"] != 3 or message.metadata.message_type != kind:
            return reply
        read = reads.from_content(reply.content)
        arguments = ("bf16",) if reads is TrainReply else ()
        return Message(replace(read, **lie).to_content(*arguments), reply_to=message)

    nodes = [{"partition-id": i, "num-partitions": 4} for i in range(4)]
    journal = Journal(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        results = run_strategies(InProcessGrid(app, nodes), config, journal, "toy")
    events = read_events(journal.path)
    wrong = [e for e in events if e["event"] in ("left_out", "refused", "client_failed")]
    assert wrong
    assert all(len(e["reason"]) < 400 for e in wrong)
    assert len(results["runs"][0]["clients"]) >= 3
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    with RunProgress(config, console) as progress:
        for event in events:
            progress(event)
    shown = final_table(results, journal.directory) + written.getvalue() + caplog.text
    shown += render(follow(events, Standing("run", "finished")))
    assert "]0;pwned\x07" not in shown
    assert "\u202e" not in shown
    assert journal.path.stat().st_size < 100_000


def test_what_an_older_journal_holds_is_shown_harmlessly(tmp_path):
    name = f"{ESC}[/x]"
    events = [
        {"event": "describe", "clients": 1, "types": {name: {"clients": 1, "bits": ESC}}, "members": {name: name}},
        {"event": "start", "strategy": ESC, "seed": 0, "of": 1},
        {"event": "client_failed", "client_id": name, "reason": "a\n" + ESC},
        {"event": "left_out", "client_id": "", "node_id": ESC, "reason": ESC},
    ]  # fmt: skip
    text = render(follow(events, Standing("run", "failed", reason=ESC)))
    written = io.StringIO()
    console = Console(file=written, width=100)
    progress = RunProgress(compose("demo"), console)
    for event in events:
        progress(event)
    assert "\x1b" not in text + written.getvalue()
    client = {"client_id": name, "type": name, "global_accuracy": 0.5, "examples": 3}
    counts = dict.fromkeys(
        ("up_per_client_round", "down_per_client_round", "one_time_up", "one_time_down",
         "lora16_bytes", "model_bytes"), 1,
    )  # fmt: skip
    runs = [
        {
            "strategy": f"s{n}{name}",
            "seed": 0,
            "clients": [client],
            "bytes": counts,
            "refused": {name: {name: 1}},
        }
        for n in range(5)
    ]
    for count in (2, 5):
        table = final_table({"runs": runs[:count]}, tmp_path / "[/x]")
        assert "[/x]" in table
        assert "\x1b" not in table


def test_logs_and_journals_hold_no_escapes(tmp_path):
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "a %s", (ESC,), None)
    assert "\x1b" not in Printable("%(message)s").format(record)
    journal = Journal(tmp_path)
    journal.event("refused", reason="z" * 100_000 + ESC)
    (event,) = [e for e in read_events(journal.path) if e["event"] == "refused"]
    assert len(event["reason"]) < 2100
    assert "\\u001b" not in json.dumps(event)
