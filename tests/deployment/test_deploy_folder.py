"""The deployment folder: certificates that strict verifiers accept, keys that stay where they belong."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import ssl
import stat
import subprocess

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.deploy import certificates, templates
from heterotune_flwr.deploy.files import write_private
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.hosts import parse_server
from heterotune_flwr.deploy.keys import key_fingerprint, new_node_key, read_public
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.submit import settle
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.program_version import code_hash


def make(folder, names=("clinic-a", "clinic-b"), renew=False, days=90.0, public=None, **settings):
    return initialise(
        folder,
        ["fl.example.org:8443", "10.0.0.1"],
        list(names),
        public or {},
        days,
        renew,
        **settings,
    )


@pytest.fixture
def deployment(tmp_path):
    return make(tmp_path / "lab")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_certificates_say_what_they_may_be_used_for(deployment):
    ca = certificates.read_certificate(deployment.folder / "ca" / "ca.crt", "")
    server = certificates.read_certificate(deployment.server / "server.crt", "")
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = server.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    extended = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.0.0.1", "127.0.0.1", "::1"]
    assert 89 < certificates.days_left(server) < 90.01
    server.verify_directly_issued_by(ca)


def test_openssl_accepts_the_chain_strictly(deployment):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "fl.example.org",
         "-CAfile", deployment.folder / "ca" / "ca.crt", deployment.server / "server.crt"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_certificate_never_outlives_its_authority():
    authority = certificates.new_authority("x", days=10)
    server = certificates.issue_server(authority, ["h.example"], days=400)
    parsed = certificates.load_certificate(server.certificate, "it")
    ca = certificates.load_certificate(authority.certificate, "it")
    assert parsed.not_valid_after_utc <= ca.not_valid_after_utc


@pytest.mark.parametrize("host", ["a b", "-?.org", "", "x..y", "300.1.1.1", "a" * 64 + ".org"])
def test_hosts_that_are_none_are_refused(host):
    with pytest.raises(ConfigError):
        certificates.alternative_name(host)


def test_servers_are_read_in_every_usual_form():
    assert parse_server("h.org") == ("h.org", None)
    assert parse_server("h.org:91") == ("h.org", 91)
    assert parse_server("[fd00::1]:91") == ("fd00::1", 91)
    assert parse_server("fd00::1") == ("fd00::1", None)
    assert str(templates.Address("fd00::1", 91)) == "[fd00::1]:91"
    for wrong in ("h.org:x", "h.org:99999", ":80"):
        with pytest.raises(ConfigError):
            parse_server(wrong)


def test_secrets_are_closed_and_lie_in_one_place(deployment):
    secrets = [
        deployment.folder / "ca" / "ca.key",
        deployment.server / "server.key",
        deployment.server / "superexec.secret",
        *(deployment.node(name) / "node.key" for name in deployment.nodes),
    ]
    for path in secrets:
        assert mode(path) == 0o600, path
    for folder in [deployment.folder, *(p for p in deployment.folder.rglob("*") if p.is_dir())]:
        assert mode(folder) == 0o700 or folder.name == "public-keys", folder
    # No secret's contents are in any other file.
    everything = [path for path in deployment.folder.rglob("*") if path.is_file()]
    for secret in secrets:
        lines = secret.read_text().splitlines()
        core = "\n".join(lines[2:-1]) if len(lines) > 3 else lines[0]
        holders = [path for path in everything if core in path.read_text()]
        assert holders == [secret]
    keys = {deployment.nodes[name].public_key.split()[1] for name in deployment.nodes}
    assert len(keys) == 2


def test_a_secret_is_never_overwritten(tmp_path):
    path = tmp_path / "secret"
    write_private(path, b"one")
    with pytest.raises(ConfigError, match="never overwritten"):
        write_private(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


def test_init_again_changes_no_key_and_keeps_what_a_node_filled_in(deployment):
    secret = {
        p: p.read_bytes()
        for p in deployment.folder.rglob("*")
        if p.suffix in (".key", ".crt", ".secret", ".pub")
    }
    mine = deployment.node("clinic-a") / "node.toml"
    mine.write_text(mine.read_text() + "# mine\n")
    again = make(deployment.folder, ["clinic-a", "clinic-c"])
    assert {p: p.read_bytes() for p in secret} == secret
    assert sorted(again.nodes) == ["clinic-a", "clinic-b", "clinic-c"]
    assert mine.read_text().endswith("# mine\n")
    assert Deployment.load(deployment.folder) == again


def test_renew_makes_a_new_server_certificate_under_the_same_authority(deployment):
    ca = (deployment.folder / "ca" / "ca.crt").read_bytes()
    old = (deployment.server / "server.crt").read_bytes()
    make(deployment.folder, renew=True)
    assert (deployment.server / "server.crt").read_bytes() != old
    assert (deployment.folder / "ca" / "ca.crt").read_bytes() == ca
    assert mode(deployment.server / "server.key") == 0o600
    with pytest.raises(ConfigError, match="--renew"):
        initialise(deployment.folder, ["new.example.org"], [], {}, 90, False)
    (deployment.folder / "ca" / "ca.key").rename(deployment.folder / "elsewhere")
    make(deployment.folder)  # without the CA's key all but a new certificate goes
    with pytest.raises(ConfigError, match="put it back"):
        make(deployment.folder, renew=True)


def test_a_node_that_makes_its_own_key_sends_the_public_half_only(tmp_path):
    run = CliRunner()
    here = tmp_path / "machine"
    made = run.invoke(app, ["node", "key", "clinic-z", "--dir", str(here)])
    assert made.exit_code == 0
    private = (here / "node.key").read_text()
    assert private.splitlines()[1] not in made.output
    line = read_public(here / "clinic-z.pub")
    assert key_fingerprint(line) in made.output
    with pytest.raises(ConfigError, match="PRIVATE key"):
        read_public(here / "node.key")
    done = run.invoke(
        app,
        [
            "deploy",
            "init",
            str(tmp_path / "lab"),
            "--server",
            "h.org",
            "--public-keys",
            str(here / "clinic-z.pub"),
        ],
    )
    assert done.exit_code == 0, done.output
    place = tmp_path / "lab" / "nodes" / "clinic-z"
    assert sorted(p.name for p in place.iterdir()) == [
        "ca.crt", "heterotune-node.service", "manifest.json", "node.toml", "start.sh",
    ]  # fmt: skip
    again = run.invoke(
        app,
        [
            "deploy",
            "add-node",
            str(tmp_path / "lab"),
            "other",
            "--public-keys",
            str(here / "clinic-z.pub"),
        ],
    )
    assert isinstance(again.exception, ConfigError)
    assert "every node needs its own" in str(again.exception)


def test_ssh_keygen_agrees_about_the_key(tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    public = new_node_key(tmp_path, "n")
    shown = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True).stdout
    assert shown.startswith("384 " + key_fingerprint(read_public(public)))
    derived = subprocess.run(
        ["ssh-keygen", "-yf", tmp_path / "node.key"], capture_output=True, text=True
    ).stdout
    assert derived.split()[:2] == public.read_text().split()[:2]


def test_errors_say_what_to_do(deployment, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    for call, words in (
        (lambda: make(other), "not empty and no deployment"),
        (lambda: make(tmp_path / "new", ["bad name"]), "is no name for a node"),
        (lambda: initialise(tmp_path / "new2", [], [], {}, 9, False), "--server HOST"),
        (lambda: Deployment.load(other), "heterotune deploy init"),
        (lambda: deployment.known("x"), "nodes: clinic-a, clinic-b"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            call()


def test_scripts_are_valid_and_start_what_they_should(deployment):
    scripts = [*deployment.server.glob("*.sh"), deployment.node("clinic-a") / "start.sh"]
    assert len(scripts) == 3
    for path in scripts:
        assert mode(path) == 0o755
        assert subprocess.run(["sh", "-n", path]).returncode == 0
        assert "$$" not in path.read_text()
    superlink = (deployment.server / "superlink.sh").read_text()
    assert "--enable-supernode-auth" in superlink
    assert "--host 127.0.0.1" in superlink
    assert "--insecure" not in superlink
    manifest = (deployment.node("clinic-a") / "manifest.json").read_text()
    assert code_hash() in manifest


def test_units_keep_the_gpu_and_wait_beyond_flowers_window(deployment):
    node = (deployment.node("clinic-a") / "heterotune-node.service").read_text()
    settings = [line for line in node.splitlines() if line and not line.startswith("#")]
    assert "Restart=always" in settings
    (wait,) = [int(line.split("=")[1]) for line in settings if line.startswith("RestartSec=")]
    assert wait > 60
    lost = (
        "PrivateDevices",
        "DevicePolicy",
        "DeviceAllow",
        "ProtectClock",
        "MemoryDenyWriteExecute",
        "ProcSubset",
    )
    assert not [line for line in settings if line.startswith(lost)]


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def complaints(unit, search=None):
    """What systemd has against a unit itself; this machine has neither its user nor the node's folder."""
    more = {"SYSTEMD_UNIT_PATH": f"{search}:"} if search else {}
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, env={**os.environ, **more}
    )  # fmt: skip
    return [
        line for line in done.stderr.splitlines()
        if str(unit.parent) in line and "not executable" not in line and "No such file" not in line
    ]  # fmt: skip


@needs_systemd
def test_systemd_accepts_the_units(deployment, tmp_path):
    units = [
        *deployment.server.glob("*.service"),
        deployment.node("clinic-a") / "heterotune-node.service",
    ]
    assert len(units) == 3
    for unit in units:
        assert complaints(unit) == []
        misspelt = tmp_path / unit.name
        misspelt.write_text(unit.read_text().replace("PrivateTmp=", "PrivateTemp="))
        assert "PrivateTemp" in complaints(misspelt)[0]


@needs_systemd
def test_systemd_accepts_the_restart_of_nginx(deployment, tmp_path):
    unit = tmp_path / "nginx.service"
    unit.write_text("[Service]\nType=forking\nExecStart=/bin/true\n")
    folder = tmp_path / "nginx.service.d"
    folder.mkdir()
    text = (deployment.server / "nginx-restart.conf").read_text()
    (folder / "restart.conf").write_text(text)
    assert complaints(unit, tmp_path) == []
    (folder / "restart.conf").write_text(text.replace("RestartSec", "RestartSecs"))
    assert "RestartSecs" in complaints(unit, tmp_path)[0]


def test_nginx_accepts_its_configuration_and_lets_only_the_fleet_in(deployment, tmp_path):
    text = (deployment.server / "nginx.conf").read_text()
    assert re.findall(r"location ([^{]*) \{", text) == ["/", "^~ /v1/fleet/"]
    if shutil.which("nginx") is None:
        return
    whole = tmp_path / "whole.conf"
    whole.write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; include "
        f"{deployment.server}/nginx.conf; }}"
    )
    done = subprocess.run(["nginx", "-t", "-c", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_expired_certificate_is_refused_by_a_client(tmp_path):
    authority = certificates.new_authority("x")
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=9)
    server = certificates.issue_server(authority, ["localhost"], 1, start=past)
    assert certificates.days_left(certificates.load_certificate(server.certificate, "")) < -7
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    assert context.cert_store_stats()["x509_ca"] == 1


def test_a_preset_becomes_a_run_of_real_nodes_in_the_deployments_own_folder(deployment):
    config, directory = settle(deployment, "demo", ["server.rounds=7"])
    assert (config.server.rounds, config.server.min_clients) == (7, 2)
    assert config.server.wait_seconds == 1800
    assert settle(deployment, "real", [])[0].server.rounds == compose("real", []).server.rounds
    assert directory.parent == deployment.folder / "runs"
    assert config.run.dir == str(directory)
    with pytest.raises(ConfigError):
        settle(deployment, "demo", ["strategies.heterotune.nothing=1"])
    (directory).mkdir()
    (directory / "results.json").touch()
    with pytest.raises(ConfigError, match="holds the results"):
        settle(deployment, "demo", [f"run.dir={directory}"])
