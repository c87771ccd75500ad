"""What a node's machine has, and what it brings: key, device, backbone, data, folders."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.client.holdout import held_size
from heterotune_flwr.client.node_keys import CLIENT
from heterotune_flwr.data.sources import examples_digest, how_read, read_examples
from heterotune_flwr.deploy.files import make_folder, present, unwritten
from heterotune_flwr.deploy.findings import Finding
from heterotune_flwr.deploy.keys import key_fingerprint, public_of
from heterotune_flwr.deploy.node_config import NodeSettings, key_trouble
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.schema import AlignmentConfig, DataConfig

DISK_GB = 1.0


def key(settings: NodeSettings) -> Iterator[Finding]:
    """The private key, fit for use."""
    trouble = key_trouble(settings)
    if trouble is not None:
        yield Finding("key", "fail", trouble)
        return
    line = public_of(settings.key, str(settings.client["client-id"]))
    yield Finding("key", "ok", f"{key_fingerprint(line)} (must be registered on the server)")


def port_taken(number: int) -> bool:
    """Whether a port of the loopback interface cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return True
    return False


def port(settings: NodeSettings) -> Iterator[Finding]:
    """A port of this machine that is taken."""
    if port_taken(settings.port):
        yield Finding(
            "port", "warn", f"port {settings.port} of this machine is taken",
            "by this node, if it runs already; otherwise set another port in [server] of node.toml",
        )  # fmt: skip


def device(settings: NodeSettings) -> Iterator[Finding]:
    """The GPU, or the CPU where none is asked for."""
    yield from device_found(settings.device)


def device_found(wanted: str | None) -> Iterator[Finding]:
    """What torch would compute on; ``wanted``: ``cpu``, ``cuda`` or ``cuda:N``, None: a GPU if there is one."""
    import psutil
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Finding("device", "ok", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif wanted not in (None, "cpu"):
        yield Finding(
            "device", "fail", f"device is {wanted} but torch sees no GPU",
            "check nvidia-smi and that torch is a CUDA build, or set device = \"cpu\"",
        )  # fmt: skip
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available / 1e9, memory.total / 1e9
        text = f"CPU, {os.cpu_count()} cores, {free:.1f} of {total:.1f} GB free"
        yield Finding("device", "ok", text)


def _budget(settings: NodeSettings) -> tuple[float, str]:
    """GB (10^9 bytes) the client may use, and whose number that is."""
    import psutil
    import torch

    given = settings.client.get("memory-gb")
    if given is not None:
        return float(given), "memory-gb"
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 1e9, "free on the GPU"
    return float(psutil.virtual_memory().available) / 1e9, "free memory"


def backbone(settings: NodeSettings) -> Iterator[Finding]:
    """The backbone at its bits, against the memory there is."""
    from heterotune_flwr.backbones.bits import candidates, check_bits, needed_gb, resolve_spec
    from heterotune_flwr.backbones.quantized import check_stored_bits
    from heterotune_flwr.backbones.sources import describe_source, resolve_source
    from heterotune_flwr.schema import AUTO

    source, bits = (
        str(settings.client["backbone"]),
        str(settings.client.get("bits", CLIENT["bits"].default)),
    )
    revision = settings.client.get("revision")
    shape = describe_source(source, revision)
    directory = resolve_source(source, revision)
    budget, whose = _budget(settings)
    if bits == AUTO:
        # The same choice that the client makes; it raises with the sizes when nothing fits.
        bits = resolve_spec(source, bits, revision, settings.client.get("memory-gb")).bits
        chosen = "auto is "
    else:
        check_bits(bits)
        check_stored_bits(source, directory, bits)
        chosen = ""
    what = f"{source}: {shape.layers} blocks of {shape.hidden}, {chosen}{bits}"
    needs = needed_gb(source, directory, dict.fromkeys((*candidates(source, directory), bits)))
    need = needs[bits]
    if need > budget:
        fitting = [known for known, size in needs.items() if size <= budget]
        yield Finding(
            "backbone", "fail", f"{what} needs {need:.2f} GB of {budget:.2f} GB ({whose})",
            f"set bits = \"{fitting[0]}\"" if fitting else "take a smaller backbone, or free memory",
        )  # fmt: skip
        return
    yield Finding("backbone", "ok", f"{what}, needs {need:.2f} GB of {budget:.2f} GB ({whose})")


def data(settings: NodeSettings) -> Iterator[Finding]:
    """The node's own examples, and its test."""
    client = settings.client
    names = {"text-field": "text", "label-field": "label", "references-field": "references"}
    fields = {key.replace("-", "_"): client.get(key, usual) for key, usual in names.items()}
    config = DataConfig(format=client.get("format"), **fields)
    for key in ("data", "test"):
        if client.get(key):
            present(Path(client[key]), key)  # says whose a closed folder is
    if client.get("data"):
        yield _own_examples(settings, Path(client["data"]), config)
    else:
        yield Finding("data", "ok", "none: a guest, who learns from what the others predict")
    if client.get("test"):
        count = len(read_examples(Path(client["test"]), config))
        least = settings.floors.test_examples
        few = count < least
        yield Finding(
            "test data", "warn" if few else "ok", f"{count} examples",
            f"nothing is told of fewer than {least} (test-examples in [floors])" if few else "",
        )  # fmt: skip


def _own_examples(settings: NodeSettings, path: Path, config: DataConfig) -> Finding:
    examples, read, floors = read_examples(path, config), how_read(path, config), settings.floors
    count, guest = len(examples), settings.client.get("guest") == "yes"
    few = not guest and count < floors.rows
    mend = (
        f"a round needs at least {floors.rows} (round-examples and step-examples in [floors]): this node takes no part "
        'and keeps its bare model; guest = "yes" joins without training on them'
    ) if few else ""  # fmt: skip
    answers = len({example.label for example in examples})
    held = held_size(count, floors)
    use = f"; {held} of them held out for its own test" if held else "; no test of its own"
    if guest:
        use = "; a guest's, for its own test alone"
    digest = examples_digest(examples)[:12]
    text = f"{count} examples, {answers} different answers (digest {digest}){use}; they stay here"
    return Finding("data", "warn" if few else "ok", f"{text}; {read}" if read else text, mend)


def anchors(settings: NodeSettings) -> Iterator[Finding]:
    """Public texts of the node's own choice."""
    from heterotune_flwr.alignment.public_texts import load_anchors

    if given := settings.client.get("anchors"):
        if given not in SHIPPED and not present(Path(given), "the anchors"):
            mend = f"a file, or one of: {', '.join(SHIPPED)}"
            yield Finding("anchors", "fail", f"there is no file {given}", mend)
            return
        count = len(load_anchors(AlignmentConfig(anchors=given)))
        yield Finding("anchors", "ok", f"{count} anchors")


def state_dir(settings: NodeSettings) -> Iterator[Finding]:
    """The folder of the client's private files."""
    yield from written_folder("state dir", make_folder(settings.state_dir))


def cache(settings: NodeSettings) -> Iterator[Finding]:
    """The cache, where the node names one."""
    if "cache" in settings.client:
        yield from written_folder("cache", make_folder(Path(settings.client["cache"])))


def written_folder(name: str, folder: Path) -> Iterator[Finding]:
    """Whether a folder that is there takes files, and has room (ConfigError: it does not take them)."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        raise ConfigError(unwritten("folder", folder, error)) from error
    if free < DISK_GB:
        yield Finding(name, "fail", f"{folder} has {free:.2f} GB free", "make room on its disk")
    else:
        yield Finding(name, "ok", f"{folder} is writable, {free:.0f} GB free")
