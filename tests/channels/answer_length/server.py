"""The server's half: asks in every training, and averages."""

from dataclasses import dataclass

from heterotune_flwr.channels.channel import Aggregated, ServerChannel
from heterotune_flwr.config.options import read_options
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.fields import option
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.wire import read_field


@dataclass(frozen=True)
class Options:
    """Options of ``answer_length``."""

    longest: int = option(1000, "no longer average is believed [letters]", least=1)


class Channel(ServerChannel):
    @classmethod
    def read(cls, given):
        return read_options(Options, given, cls.name)

    def request(self, server_round, client_id, purposes):
        return Payload() if "train" in purposes else None

    def aggregate(self, server_round, replies, updates):
        lengths, refused = {}, {}
        for client_id, reply in replies.items():
            try:
                letters = read_field(reply.fields if reply else {}, "letters", float)
                if not 0 <= letters <= self.options.longest:
                    raise ExchangeError(f"answers of {letters} letters on average")
                lengths[client_id] = letters
            except ExchangeError as error:
                refused[client_id] = str(error)
        mean = sum(lengths.values()) / max(len(lengths), 1)
        return Aggregated({"letters": mean, "clients": len(lengths)}, refused)
