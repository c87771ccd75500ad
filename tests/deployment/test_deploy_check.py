"""``node.toml`` and ``heterotune node check``: every trouble has its line and its remedy."""

from __future__ import annotations

import datetime
import json

import pytest
from typer.testing import CliRunner

from benchmarks.deployment.tls_server import TlsServer
from heterotune_flwr.cli import app
from heterotune_flwr.deploy import certificates, node_check, server_checks
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.node_config import (
    PIECE_BYTES,
    PIECE_VARIABLE,
    read_node_settings,
    supernode_command,
)
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.program_version import code_hash


@pytest.fixture
def node(tmp_path):
    """A node folder that is ready to join but for its server."""
    deployment = initialise(tmp_path / "lab", ["127.0.0.1:1"], ["clinic"], {}, 90, False)
    place = deployment.node("clinic")
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(64)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def edit(place, old, new):
    text = (place / "node.toml").read_text()
    assert old in text
    (place / "node.toml").write_text(text.replace(old, new))


def authority(place):
    folder = place.parents[1] / "ca"
    return certificates.Pair((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())


def found(findings):
    return {finding.name: finding for finding in findings}


def test_a_ready_machine_passes(node, tmp_path):
    with TlsServer(certificates.issue_server(authority(node), ["127.0.0.1"]), tmp_path) as server:
        edit(node, "127.0.0.1:1", f"127.0.0.1:{server.port}")
        done = CliRunner().invoke(app, ["node", "check", str(node / "node.toml"), "--json"])
    answer = json.loads(done.output)
    assert done.exit_code == 0, done.output
    assert answer["ready"]
    states = {check["name"]: check["state"] for check in answer["checks"]}
    assert states == dict.fromkeys(
        ("settings", "key", "device", "backbone", "data", "state dir", "libraries", "code", "server", "clock"), "ok"
    )  # fmt: skip
    data = next(check for check in answer["checks"] if check["name"] == "data")
    assert data["message"].startswith("64 examples, 3 different answers")
    assert "text 1" not in done.output  # counts, never contents


def test_troubles_of_the_machine_have_a_remedy_each(node):
    (node / "node.key").chmod(0o644)
    edit(node, 'backbone = "tiny-a"', 'backbone = "tiny-d"')
    edit(node, 'text-field = "text"', 'text-field = "question"')
    (node / "state").write_text("a file where a folder should be")
    manifest = json.loads((node / "manifest.json").read_text())
    manifest |= {"code_hash": "0" * 16, "versions": {**manifest["versions"], "flwr": "1.40.0"}}
    (node / "manifest.json").write_text(json.dumps(manifest))
    checks = found(node_check.check_node(node / "node.toml", offline=True))
    remedies = {
        "key": "chmod 600",
        "backbone": "did you mean 'tiny-",
        "data": "columns present: label, text",
        "state dir": "is a file where a folder should be",
        "libraries": "pip install flwr==1.40.0",
        "code": "install the server's version here",
    }
    for name, words in remedies.items():
        assert checks[name].state == "fail", name
        assert words in checks[name].message + checks[name].mend
    done = CliRunner().invoke(app, ["node", "check", str(node / "node.toml"), "--offline"])
    assert done.exit_code == 1
    assert "not ready: 6 to mend" in done.output


def test_a_nodes_files_are_read_as_in_a_run(node):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    rows = [{"conversations": turns}] * 40
    (node / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    findings = found(node_check.check_node(node / "node.toml", offline=True))
    assert findings["data"].state == "ok"
    assert "read as conversations" in findings["data"].message
    rows.append({"conversations": None})
    (node / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    findings = found(node_check.check_node(node / "node.toml", offline=True))
    assert findings["data"].state == "fail"
    assert "data.jsonl:41: 'conversations' is no conversation" in findings["data"].message


def test_a_backbone_that_does_not_fit_names_bits_that_do(node):
    edit(node, 'bits = "auto"', 'bits = "fp32"\nmemory-gb = 0.604')
    finding = found(node_check.check_node(node, offline=True))["backbone"]
    assert finding.state == "fail"
    assert finding.mend in ('set bits = "bf16"', 'set bits = "int8"', 'set bits = "nf4"')
    edit(node, "memory-gb = 0.604", "memory-gb = 0.1")
    assert "smaller backbone" in found(node_check.check_node(node, offline=True))["backbone"].mend


def past(days):
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)


@pytest.mark.parametrize(
    ("case", "name", "state", "words"),
    [
        ("other CA", "server", "fail", "another CA made its certificate"),
        ("expired", "server", "fail", "has expired"),
        ("not yet", "server", "fail", "not valid yet"),
        ("other name", "server", "fail", "does not name '127.0.0.1'"),
        ("plain", "server", "fail", "does not speak TLS"),
        ("nobody", "server", "fail", "nothing listens there"),
        ("ends soon", "server", "warn", "--renew"),
        ("ahead", "clock", "fail", "ahead of the server"),
        ("open", "proxy", "warn", "tell the operator"),
        ("no SuperLink", "superlink", "fail", "the SuperLink behind it does not (status 502)"),
    ],
)
def test_troubles_with_the_server(node, tmp_path, case, name, state, words):
    maker, hosts, settings, options = authority(node), ["127.0.0.1"], {}, {}
    if case == "other CA":
        maker = certificates.new_authority("somebody else")
    elif case == "expired":
        settings = {"days": 1, "start": past(3)}
    elif case == "not yet":
        settings = {"start": past(-2)}
    elif case == "ends soon":
        settings = {"days": 5}
    elif case == "other name":
        hosts = ["fl.example.org"]
    elif case == "ahead":
        options = {"offset": -60.0}
    elif case == "open":
        options = {"control": 200}
    elif case == "no SuperLink":  # nginx, whose upstream is down
        options = {"control": 502}
    pair = None if case == "plain" else certificates.issue_server(maker, hosts, **settings)
    with TlsServer(pair, tmp_path, **options) as server:
        if case != "nobody":
            edit(node, "127.0.0.1:1", f"127.0.0.1:{server.port}")
        settings_read = read_node_settings(node)
        finding = found(node_check.guarded(server_checks.server, settings_read))[name]
    assert finding.state == state
    assert words in finding.message + finding.mend


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("client-id =", "clientid =", "did you mean client-id?"),
        ("[client]", "[klient]", "tables [server], [client] and"),
        ('backbone = "tiny-a"', "", "lacks backbone"),
        ("127.0.0.1:1", "127.0.0.1", "write it as host:port"),
        ('bits = "auto"', 'bits = "int3"', "choose from nf4"),
        ('bits = "auto"', "bits = 4", "must be a text"),
        ('# device = "cuda:0"', 'device = "gpu"', "write cpu, cuda or cuda:0"),
        ("# threads = 2", "threads = 0", "above 0"),
        ("# report =", "report = 'nothing' #", "counts-and-loss-only"),
        ("[server]", "[server", "not valid TOML"),
    ],
)
def test_wrong_settings_are_named(node, old, new, words):
    edit(node, old, new)
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace("?", r"\?")):
        read_node_settings(node)
    (finding,) = node_check.check_node(node)
    assert finding.state == "fail"


def test_what_the_supernode_is_started_with(node):
    from flwr.common.config import parse_config_args

    edit(node, "# threads = 2", "threads = 2")
    edit(node, "# memory-gb = 7.5", "memory-gb = 7.5")
    edit(node, '# device = "cuda:0"', 'device = "cpu"')
    edit(node, 'data = "data.jsonl"', "data = 'my \"own\" data.jsonl'")
    settings = read_node_settings(node)
    command = supernode_command(settings)
    again = supernode_command(settings)  # a restart writes the file anew
    assert command == again
    assert "--insecure" not in command
    parsed = parse_config_args([command[command.index("--node-config") + 1]])
    assert parsed["data"] == str(node / 'my "own" data.jsonl')
    assert (parsed["threads"], parsed["memory-gb"], parsed["client-id"]) == (2, 7.5, "clinic")
    assert parsed["code-hash"] == code_hash()
    assert "device" not in parsed
    assert parsed["state-dir"] == str(node / "state")
    environment = settings.environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment[PIECE_VARIABLE] == str(PIECE_BYTES)
    edit(node, '# accept-code = "any"', 'accept-code = "any"')
    assert "code-hash" not in read_node_settings(node).node_config()
    (node / "node.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        supernode_command(settings)
    (node / "node.key").unlink()
    with pytest.raises(ConfigError, match="heterotune node key"):
        supernode_command(settings)
