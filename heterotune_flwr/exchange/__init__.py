"""How tensors travel and rest: packed Flower records, codecs, atomic files, states without pickle.

Numpy only: it knows neither what a tensor means nor who sent it, and believes no byte before it is checked.
"""

from heterotune_flwr.exchange.codecs import Codec, RecordCodec

__all__ = ["Codec", "RecordCodec"]
