#!/bin/sh
# Makes what a trial needs: certificates, keys, settings of two nodes, and examples for them. May be given again.
set -eu
heterotune deploy init /lab --server server:8443 --node n1 --node n2
sed -i 's/^backbone = "tiny-a"/backbone = "tiny-b"/' /lab/nodes/n2/node.toml
python /opt/heterotune/trial_data.py /lab/nodes/n1/data.jsonl /lab/nodes/n2/data.jsonl
