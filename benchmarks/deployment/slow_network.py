"""Links of a given speed, latency and loss between network namespaces of this machine (root only).

A fast link without loss is a pair of virtual Ethernet devices with the kernel's token bucket (``tc ... tbf``). A slow,
long, lossy one is done as ``tc ... netem`` does it, but in this process, because not every kernel has netem (this
needs only TUN): packet by packet, for each direction by itself, a packet is dropped with the given probability, waits
for its turn at the given rate behind at most :data:`QUEUE` others, and arrives ``delay`` later. TCP, TLS and everything
above are the real ones; it is their packets that are lost.

The server has :data:`SERVER` in a namespace of its own, every node a namespace with one link to it; the address
survives whatever the links are like.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Address of the server, whatever the link.
SERVER = "10.78.0.1"
#: Packets that wait at most for a link, as netem has it.
QUEUE = 1000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LONGEST_PACKET = 65536


@dataclass(frozen=True)
class Link:
    """What a link is like, in each of its directions.

    Attributes
    ----------
    rate
        Bits per second.
    delay
        Seconds from one end to the other; a round trip takes two of them.
    loss
        Probability with which a packet is dropped.

    """

    name: str
    rate: float
    delay: float = 0.0
    loss: float = 0.0


FAST = Link("fast", 400e6)  # 50 MB/s
SLOW = Link("slow", 1e6, 0.2, 0.02)


@dataclass
class Pipe:
    """One direction of a slow link: which packets arrive, and when.

    Parameters
    ----------
    link, rng
        What it is like, and who is dropped.

    """

    link: Link
    rng: random.Random
    sent: int = 0
    dropped: int = 0
    bytes: int = 0
    _free: float = 0.0
    _waiting: list[tuple[float, int, bytes]] = field(default_factory=list)

    def put(self, packet: bytes, now: float) -> None:
        """Take a packet that is sent at ``now`` (seconds)."""
        self.sent += 1
        if self.rng.random() < self.link.loss or len(self._waiting) >= self._limit:
            self.dropped += 1
            return
        self.bytes += len(packet)
        self._free = max(self._free, now) + 8 * len(packet) / self.link.rate
        heapq.heappush(self._waiting, (self._free + self.link.delay, self.sent, packet))

    @property
    def _limit(self) -> float:
        # Those under way do not wait: the delay holds as many as it takes at this rate.
        return QUEUE + self.link.rate * self.link.delay / 8 / 1000

    def due(self, now: float) -> list[bytes]:
        """Packets that have arrived by ``now``."""
        arrived = []
        while self._waiting and self._waiting[0][0] <= now:
            arrived.append(heapq.heappop(self._waiting)[2])
        return arrived

    @property
    def next(self) -> float:
        """When the next packet arrives; infinity while none is under way."""
        return self._waiting[0][0] if self._waiting else float("inf")


def ip(*arguments: str) -> None:
    """Run ``ip``."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def inside(namespace: str, *command: str) -> list[str]:
    """A command as it is run in a namespace."""
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]


class Network:
    """A server's namespace and one per node, with a link each; use as a context manager.

    Parameters
    ----------
    nodes
        Names of the nodes.
    congestion
        TCP's congestion control on the links; ``cubic`` is Linux's default, ``bbr`` cares less about losses.
    seed
        Of the losses.

    """

    def __init__(self, nodes: Sequence[str], congestion: str = "cubic", seed: int = 0) -> None:
        self.nodes, self.congestion = list(nodes), congestion
        self.prefix = f"ht{os.getpid()}"
        self.server = f"{self.prefix}-server"
        self._rng = random.Random(seed)
        self._relay: Relay | None = None

    def node(self, name: str) -> str:
        """Namespace of a node."""
        return f"{self.prefix}-{self.nodes.index(name)}"

    @property
    def _namespaces(self) -> list[str]:
        return [self.server, *map(self.node, self.nodes)]

    def __enter__(self) -> Network:
        try:
            for name in self._namespaces:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self.server, "addr", "add", f"{SERVER}/32", "dev", "lo")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove links and namespaces."""
        self.unlink()
        for name in self._namespaces:
            if Path("/run/netns", name).exists():
                ip("netns", "del", name)

    def link(self, link: Link) -> None:
        """Connect every node to the server by a link of this kind, in place of what there was."""
        self.unlink()
        pairs = []
        for number, name in enumerate(self.nodes):
            ends = [(self.server, f"s{number}", 1), (self.node(name), "net", 2)]
            if link.delay or link.loss:
                pairs.append([_tun(space, device) for space, device, _ in ends])
            else:
                peer = ["peer", "name", "net", "netns", self.node(name)]
                ip("-n", self.server, "link", "add", f"s{number}", "type", "veth", *peer)
                for space, device, _ in ends:
                    _bucket(space, device, link.rate)
            for space, device, host in ends:
                address = f"10.78.{number + 1}.{host}/30"
                ip("-n", space, "addr", "add", address, "dev", device)
                ip("-n", space, "link", "set", device, "up")
            # By route, because the setting of a whole namespace takes only what the machine allows to everybody.
            control = ["congctl", self.congestion]
            subnet, gateway = f"10.78.{number + 1}.0/30", f"10.78.{number + 1}.1"
            ip("-n", self.server, "route", "replace", subnet, "dev", f"s{number}", *control)
            ip("-n", self.node(name), "route", "add", "default", "via", gateway, *control)
        if pairs:
            self._relay = Relay(pairs, link, self._rng)

    def unlink(self) -> None:
        """Cut all links."""
        if self._relay is not None:
            self._relay.close()  # a TUN device goes with its file
            self._relay = None
        for number in range(len(self.nodes)):
            if Path("/run/netns", self.server).exists():
                arguments = ["ip", "-n", self.server, "link", "del", f"s{number}"]
                subprocess.run(arguments, capture_output=True, check=False)

    def traffic(self) -> dict[str, int]:
        """Packets and bytes of the slow links so far, and how many packets were dropped."""
        pipes = self._relay.pipes if self._relay else []
        return {name: sum(getattr(p, name) for p in pipes) for name in ("sent", "dropped", "bytes")}


def _tun(namespace: str, device: str) -> int:
    """Make a TUN device in a namespace; returns the file that holds its packets."""
    name = f"t{os.getpid()}"
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    ip("link", "set", name, "netns", namespace)
    ip("-n", namespace, "link", "set", name, "name", device)
    return file


def _bucket(namespace: str, device: str, rate: float) -> None:
    shape = ["tbf", "rate", f"{rate:.0f}bit", "burst", "256kb", "latency", "50ms"]
    subprocess.run(
        ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shape], check=True
    )


class Relay:
    """Carries packets between pairs of TUN files, through a :class:`Pipe` each way, in a thread of its own."""

    def __init__(self, pairs: Sequence[Sequence[int]], link: Link, rng: random.Random) -> None:
        self.pipes: list[Pipe] = []
        self._ways: dict[int, tuple[Pipe, int]] = {}
        for one, other in pairs:
            for source, target in ((one, other), (other, one)):
                pipe = Pipe(link, random.Random(rng.random()))
                self.pipes.append(pipe)
                self._ways[source] = (pipe, target)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and close the files."""
        self._stop.set()
        self._thread.join()
        for file in self._ways:
            os.close(file)

    def _carry(self) -> None:
        poll = select.poll()
        for file in self._ways:
            poll.register(file, select.POLLIN)
        while not self._stop.is_set():
            next_arrival = min(pipe.next for pipe in self.pipes)
            pause = min(max(next_arrival - time.monotonic(), 0.0), 0.2)
            for file, _ in poll.poll(1000 * pause):
                self._read(file)
            now = time.monotonic()
            for pipe, target in self._ways.values():
                for packet in pipe.due(now):
                    self._write(target, packet)

    def _read(self, file: int) -> None:
        pipe, _ = self._ways[file]
        while True:
            try:
                packet = os.read(file, _LONGEST_PACKET)
            except (BlockingIOError, OSError):
                return
            pipe.put(packet, time.monotonic())

    @staticmethod
    def _write(file: int, packet: bytes) -> None:
        try:
            os.write(file, packet)
        except OSError:  # the device is down, or its queue full: lost, as on a wire
            return
