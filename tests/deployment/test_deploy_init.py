"""``deploy init``: what is refused changes nothing, what was cut short is taken up, damage is called so."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from heterotune_flwr.deploy import certificates, pairs
from heterotune_flwr.deploy.files import write_private
from heterotune_flwr.deploy.folder import initialise, write_folder
from heterotune_flwr.deploy.hosts import parse_server
from heterotune_flwr.deploy.keys import key_body, new_node_key, public_of, read_public
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.errors import ConfigError

#: Makes a folder for each step of `init` at which it is killed (a file appears under its name), in a child of its own.
KILLER = """
import os, sys
from pathlib import Path
from heterotune_flwr.deploy.folder import initialise

base, renew = Path(sys.argv[1]), sys.argv[2] == "renew"
for at in range(1, 40):
    folder = base / str(at)
    if renew:
        initialise(folder, ["10.0.0.1"], ["a"], {}, 90, False)
    if (child := os.fork()) == 0:
        steps = 0
        def killing(call):
            def step(*arguments, **named):
                global steps
                steps += 1
                if steps == at and not after:
                    os._exit(9)
                call(*arguments, **named)
                if steps == at:
                    os._exit(9)
            return step
        after = at % 2 == 0  # at even steps behind it: the file is there, its half-written copy too
        os.replace, os.link = killing(os.replace), killing(os.link)
        initialise(folder, ["10.0.0.1"], ["a"], {}, 90, renew)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(at)
"""


def init(folder, servers=("10.0.0.1",), names=("a",), renew=False, public=None, **settings):
    return initialise(folder, list(servers), list(names), public or {}, 90, renew, **settings)


@pytest.mark.parametrize("mode", ["new", "renew"])
def test_init_takes_up_what_a_killed_one_has_left(tmp_path, mode):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, mode], capture_output=True, text=True, timeout=300
    )
    steps = int(done.stdout)
    assert steps > (15 if mode == "new" else 2), done.stderr
    for at in range(1, steps + 1):
        deployment = init(tmp_path / str(at))
        place = deployment.node("a")
        line = deployment.nodes["a"].public_key
        assert key_body(public_of(place / "node.key", "a")) == key_body(line)
        assert read_public(place / "node.pub") == line
        for file in ("ca/ca", "server/server"):
            pem = (deployment.folder / f"{file}.crt").read_bytes()
            key = certificates.load_key((deployment.folder / f"{file}.key").read_bytes(), file)
            parsed = certificates.load_certificate(pem, file)
            assert certificates.belong_together(parsed, key), (at, file)
        assert not list(deployment.folder.rglob(".*")), at
        assert not list(deployment.folder.rglob("*.new")), at


def test_a_certificate_and_another_key_are_not_taken_for_a_pair(tmp_path):
    deployment = init(tmp_path / "lab")
    ca, key = deployment.folder / "ca" / "ca.key", deployment.server / "server.key"
    good, old = ca.read_bytes(), key.read_bytes()
    key.write_bytes(certificates.new_key())
    init(deployment.folder)  # a new certificate, as the CA's key is there
    assert key.read_bytes() != old
    ca.write_bytes(certificates.new_key())
    with pytest.raises(ConfigError, match="is not the key of"):
        init(deployment.folder)
    ca.write_bytes(good)
    (deployment.folder / "ca" / "ca.crt").unlink()
    init(deployment.folder)  # from the server's copy
    (deployment.folder / "ca" / "ca.crt").unlink()
    (deployment.server / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"restore ca\.crt"):  # it has signed the server's
        init(deployment.folder)


def test_a_certificate_of_another_authority_is_not_served(tmp_path):
    deployment = init(tmp_path / "lab")
    made = certificates.issue_server(certificates.new_authority("10.0.0.1"), ["10.0.0.1"])
    (deployment.server / "server.crt").write_bytes(made.certificate)
    with pytest.raises(ConfigError, match="--renew"):
        init(deployment.folder)
    init(deployment.folder, renew=True)


def test_copies_of_secrets_that_are_being_written_stay(tmp_path):
    """Another command may be at work; what it writes is not taken away from it."""
    deployment = init(tmp_path / "lab")
    busy, dead = (deployment.node("a") / f".node.key.{number}" for number in (1, 4194304 * 2))
    for path in (busy, dead):
        write_private(path, b"x")
    init(deployment.folder)
    assert busy.exists()
    assert not dead.exists()


def test_what_is_refused_changes_nothing(tmp_path):
    folder = tmp_path / "lab"
    before = init(folder)
    own = new_node_key(tmp_path / "own", "b")
    for call in (
        lambda: init(folder, ["10.0.0.1", "lab.example.org"]),
        lambda: init(folder, ["10.0.0.1"], ["no name"], internal_port=9000),
        lambda: init(folder, public={"a": read_public(own)}, user="other"),
    ):
        with pytest.raises(ConfigError):
            call()
        assert Deployment.load(folder) == before
    with pytest.raises(ConfigError):
        init(tmp_path / "other", names=["no name"])
    assert not (tmp_path / "other").exists()
    init(folder, ["10.0.0.1", "lab.example.org"], renew=True)


def test_a_node_can_be_added_where_the_certificate_lacks_a_name(tmp_path):
    deployment = init(tmp_path / "lab")
    deployment.hosts.append("lab.example.org")  # as an older version left it
    deployment.save()
    loaded = Deployment.load(deployment.folder)
    assert loaded.add_node("b")
    write_folder(loaded)
    with pytest.raises(ConfigError, match="add --renew to make one that does"):
        init(deployment.folder, servers=())


def test_hosts_are_compared_as_what_they_are(tmp_path):
    assert parse_server("2001:DB8::1") == parse_server("2001:db8:0::1") == ("2001:db8::1", None)
    folder = tmp_path / "lab"
    init(folder, ["2001:DB8::1", "Lab.Example.Org"])
    init(folder, ["2001:DB8::1", "Lab.Example.Org"])
    kept = json.loads((folder / "deployment.json").read_text())
    kept["hosts"] = ["2001:DB8::1", "LAB.example.org"]  # as an older version wrote it
    (folder / "deployment.json").write_text(json.dumps(kept))
    assert pairs.missing_names(folder / "server", kept["hosts"]) == []
    init(folder, servers=())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"node_folder": "relative dir"}, "absolute path"),
        ({"node_folder": "/opt/my node"}, "cannot hold ' ' in a path"),
        ({"node_folder": "/opt/50%"}, "cannot hold '%'"),
        ({"node_bin": '/opt/"x"'}, "cannot hold '\"'"),
        ({"user": "bad user"}, "no name of a user"),
        ({"internal_port": -1}, "there is no port -1"),
        ({"internal_port": 99999}, "there is no port 99999"),
        ({"internal_port": 8443}, "cannot be both"),
    ],
)
def test_what_units_cannot_hold_is_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        init(tmp_path / "lab", **settings)
    with pytest.raises(ConfigError, match="the deployment folder is"):
        init(tmp_path / "my lab")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("days", [float("nan"), float("inf"), 0.0])
def test_days_are_a_number_of_days(tmp_path, days):
    with pytest.raises(ConfigError, match="--days"):
        initialise(tmp_path / "lab", ["h.org"], [], {}, days, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hosts": []}, "names no host"),
        ({"nodes": {"a": {"public_key": ""}}}, "a key of node 'a' is no OpenSSH public key"),
        ({"nodes": 3}, "is damaged"),
    ],
)
def test_a_damaged_deployment_is_called_so(tmp_path, change, words):
    folder = init(tmp_path / "lab").folder
    kept = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps(kept | change))
    with pytest.raises(ConfigError, match=words):
        Deployment.load(folder)


def test_public_key_files_are_one_ascii_line(tmp_path):
    public = new_node_key(tmp_path, "n")
    raw = public.read_bytes().strip()
    public.write_bytes(raw + " of Jürgen\n".encode("latin-1"))
    line = read_public(public)
    assert line.isascii()
    assert key_body(line) == raw.rsplit(b" ", 1)[0].decode()
    public.write_bytes(raw + b"\n" + raw + b"\n")
    with pytest.raises(ConfigError, match="holds 2 lines"):
        read_public(public)
    public.write_bytes(b"")
    with pytest.raises(ConfigError, match="no OpenSSH public key"):
        read_public(public)
