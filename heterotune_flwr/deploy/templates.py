"""Texts of the scripts, units and settings that a deployment folder holds."""

from __future__ import annotations

from string import Template

from heterotune_flwr.client.floors import KEYS, Floors
from heterotune_flwr.client.node_keys import SERVER
from heterotune_flwr.deploy.hosts import Address

#: Flower's server-side patience with a node it believes online (two missed heartbeats of 30 s): a node that comes
#: back sooner under the same key is refused (exit code 305), so a restart waits longer.
RESTART_SECONDS = 75


#: Every script: stop at the first error, make files for their owner only, and know the script's folder.
_BEGIN = """\
set -eu
umask 077
here="$$(CDPATH= cd -- "$$(dirname -- "$$0")" && pwd)"
export PATH="$${HETEROTUNE_BIN:-$bin}:$$PATH"
"""
_SERVER_BEGIN = (
    _BEGIN
    + """\
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_HOME="$$here/state/flwr"
mkdir -p "$$here/state"
cd "$$here/state"  # a folder without code: it is on the search path of what is started here
"""
)

SUPERLINK = Template(
    """\
#!/bin/sh
# The SuperLink: TLS, nodes must prove who they are, runs and registrations survive a restart.
# It listens on this machine only. Nodes come in through nginx (nginx.conf), which lets the fleet routes pass; the
# control routes have no password, and whoever reaches them can run code on every node.
"""
    + _SERVER_BEGIN
    + """\
exec flower-superlink --host 127.0.0.1 --port $port \\
  --ssl-ca-certfile "$$here/ca.crt" --ssl-certfile "$$here/server.crt" --ssl-keyfile "$$here/server.key" \\
  --enable-supernode-auth --database "$$here/state/superlink.db" \\
  --isolation process --superexec-auth-secret-file "$$here/superexec.secret" \\
  --disable-runtime-dependency-installation
"""
)
SUPEREXEC = Template(
    """\
#!/bin/sh
# The SuperExec: starts the ServerApp of every run. A process of its own, so that a restarted SuperLink finds the run
# still going on. (Flower ends the ServerApps along with their SuperExec: such a run is resumed.)
"""
    + _SERVER_BEGIN
    + """\
exec flower-superexec --runtime-api-address 127.0.0.1:$port --root-certificates "$$here/ca.crt" \\
  --superexec-auth-secret-file "$$here/superexec.secret"
"""
)
NODE_SCRIPT = Template(
    """\
#!/bin/sh
# Checks node.toml and becomes the SuperNode; without systemd: `until ./start.sh; do sleep $restart; done`
# (Flower refuses a node that comes back within 60 s of its death).
"""
    + _BEGIN
    + """\
exec heterotune node start "$$here/node.toml"
"""
)
# ProtectSystem=strict makes everything read-only but ReadWritePaths.
_HARDENING = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077
"""
SERVER_UNIT = Template(
    """\
# cp $name.service /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --now $name
# The whole deployment folder must belong to the user below: chown -R $user: DIR
[Unit]
Description=heterotune: $what
Wants=network-online.target
After=network-online.target$after
StartLimitIntervalSec=0

[Service]
User=$user
ExecStart=$here/$script
Restart=always
RestartSec=5
"""
    + _HARDENING
    + """\
ReadWritePaths=$here/state$runs
ProtectHome=read-only
PrivateDevices=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK

[Install]
WantedBy=multi-user.target
"""
)
NODE_UNIT = Template(
    """\
# On the node: change the paths if this folder does not lie in $here, make the user below if there is none
# (useradd --system --user-group --no-create-home $user), give it the folder (chown -R $user: $here), then
# cp heterotune-node.service /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --now heterotune-node
[Unit]
Description=heterotune: node $node
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=$user
ExecStart=$here/start.sh
Restart=always
# Beyond the 60 s during which Flower refuses a node that it still believes online.
RestartSec=$restart
KillMode=mixed
TimeoutStopSec=30
# The sockets of the warm worker.
RuntimeDirectory=heterotune-$node
RuntimeDirectoryMode=0700
Environment=HETEROTUNE_RUNTIME_DIR=%t/heterotune-$node
Environment=HETEROTUNE_CACHE=$here/cache
"""
    + _HARDENING
    + """\
ReadWritePaths=$here
ProtectHome=read-only
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
# Not set, because a GPU would be lost: PrivateDevices, DevicePolicy and ProtectClock (they hide /dev/nvidia*),
# MemoryDenyWriteExecute (CUDA and torch write code at run time), ProcSubset=pid (the driver reads /proc/driver).
# NoNewPrivileges keeps nvidia-modprobe from making /dev/nvidia-uvm: let nvidia-persistenced, or one nvidia-smi at
# boot, make it first. If the device files belong to groups: SupplementaryGroups=video render

[Install]
WantedBy=multi-user.target
"""
)
NGINX = Template(
    """\
# nginx in front of the SuperLink: TLS, and of all its routes only those that nodes need. As a file of its own in
# /etc/nginx/conf.d/ (then `nginx -t && systemctl reload nginx`). The paths are this folder's; nginx reads them as root.
limit_req_zone $$binary_remote_addr zone=heterotune:1m rate=100r/s;

server {
    listen $listen ssl;
    listen [::]:$listen ssl;
    server_name $names;
    server_tokens off;

    ssl_certificate $here/server.crt;
    ssl_certificate_key $here/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_tickets off;

    # Everything else is control of the federation (/v1/control), its processes (/v1/runtime), or documentation.
    location / {
        return 403;
    }

    location ^~ /v1/fleet/ {
        limit_except POST { deny all; }
        limit_req zone=heterotune burst=400 nodelay;
        client_max_body_size 64m;  # Flower cuts arrays into pieces of less
        proxy_request_buffering off;
        proxy_read_timeout 120s;
        proxy_send_timeout 120s;
        proxy_pass https://127.0.0.1:$port;
        proxy_http_version 1.1;
        proxy_set_header Host $$host;
        proxy_ssl_trusted_certificate $here/ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
    }
}
"""
)
NGINX_RESTART = """\
# Debian's nginx.service does not start a killed nginx again, and without it no node gets in. On the server:
# install -D -m 644 nginx-restart.conf /etc/systemd/system/nginx.service.d/restart.conf && systemctl daemon-reload
[Unit]
StartLimitIntervalSec=0

[Service]
Restart=always
RestartSec=5
"""
FLOWER_CONFIG = Template(
    """\
# FLWR_HOME of the operator, on the server: export FLWR_HOME=$home; then: flwr run APP lab --stream
[superlink]
default = "lab"

[superlink.lab]
address = "127.0.0.1:$port"
root-certificates = "$ca"
"""
)
_NODE_TOML = Template(
    """\
# What this machine brings to the federation. Paths are relative to this file. `heterotune node check` tells whether
# it will do; `heterotune node start` (start.sh) joins.
[server]
address = "$address"
ca = "ca.crt"         # how the server is recognised
key = "node.key"      # how this node is recognised: 0600, never leaves this machine
# port = $runtime_port         # of this machine's loopback interface; another one for a second node here
# accept-code = "any"  # default "installed": refuse a run whose code is not the heterotune-flwr installed here

[client]
client-id = "$node"
backbone = "tiny-a"   # an embedded (tiny-a/b/c) or fetched name, a directory, a .gguf file, or a hub id
bits = "auto"         # nf4 | nf4-single | int8 | bf16 | fp32 | auto: the widest that fits memory-gb
# memory-gb = 7.5     # for weights and a training step; default: what is free on the GPU
# device = "cuda:0"   # or "cpu"; default: the GPU if there is one
# threads = 2

data = "data.jsonl"   # .jsonl, .json, .csv, .parquet, or a directory saved by `datasets`; never leaves this machine
# format = "parquet"  # where the name does not tell: jsonl | csv | parquet | dataset
text-field = "text"   # column with the text, or with chat messages (a list of {role, content})
label-field = "label" # column with the answer; not used for chat messages: the last reply of the assistant is it
# references-field = "references" # column with a list of further right answers (docs/generation.md)
# test = "test.jsonl" # public test set everybody is measured on, if this node should measure it

state-dir = "state"   # this client's private weights and logs; keep it, and a node that comes back goes on with it
# report = "counts-and-loss-only"  # beside the update tell only examples, steps, learning rate and loss
# guest = "yes"       # no labelled examples here, data is optional: it learns after the last round (docs/guests.md)
# losses = "entropy"  # losses of installed packages that a run may add (docs/custom-strategy.md); default: none
# answers = "yes"     # let answers go that the model writes on public prompts, where a run asks (docs/generation.md)
class-sums = "no"     # "yes": tell counts and sums of this node's classes, where a run asks (docs/method.md).
# From the class sums the server can tell which texts a node trained on: all members were found among 2,000 candidates.
details = "no"        # for a run's report: "counts": how often labels occur here, and are mistaken for which;
                      # "texts": also three examples of this node's test, with what the models answer

# What this node holds to whatever a run says, so that a server cannot read it row by row (docs/privacy.md says what
# this does not stop). What goes below them is refused, and the run goes on without this node.
[floors]
$floors"""
)


def node_toml(address: Address, node: str) -> str:
    """A node's settings, to be filled in by its owner."""
    floors = Floors()
    lines = (
        f"{key} = {getattr(floors, item.name)}".ljust(22) + f"# {item.metadata['help']}\n"
        for key, item in KEYS.items()
    )
    return _NODE_TOML.substitute(
        address=address, node=node, runtime_port=SERVER["port"].default, floors="".join(lines)
    )
