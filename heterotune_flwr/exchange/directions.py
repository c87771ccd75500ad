"""Which codec a run uses for what: updates up, values down, and everything that must stay exact."""

from __future__ import annotations

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.codecs import TOPK, find_codec, precise, topk_name
from heterotune_flwr.schema import ExchangeConfig


def _full(name: str, exchange: ExchangeConfig) -> str:
    return topk_name(exchange.top_k) if name == TOPK else name


def up_codec(exchange: ExchangeConfig) -> str:
    """Codec of the clients' updates."""
    return _full(exchange.up or exchange.codec, exchange)


def down_codec(exchange: ExchangeConfig) -> str:
    """Codec of the values sent to clients."""
    return _full(exchange.down or exchange.codec, exchange)


def exact_codec(exchange: ExchangeConfig) -> str:
    """Codec of alignment factors, maps and control variates: at least as exact as bf16."""
    return precise(exchange.codec)


def check_directions(exchange: ExchangeConfig) -> None:
    """Refuse a codec that leaves numbers out where values travel (ConfigError)."""
    down = down_codec(exchange)
    if getattr(find_codec(down), "sparse", False):
        raise ConfigError(
            f"{down} would leave out most of the values a client starts from; it is for updates alone: set "
            f"exchange.up={down.partition(':')[0]} and exchange.down=bf16 (or int8, nf4)"
        )
