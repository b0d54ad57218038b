"""Random streams keyed by what they are for, so that no draw depends on worker, rank, order or an interruption."""

import hashlib

import numpy as np


def key(seed: int, *parts: int | str) -> tuple[int, int]:
    """Two 64-bit words that depend on every part and on the parts' order.

    BLAKE2b rather than arithmetic on the seed: neighbouring seeds, epochs and samples must give unrelated streams.
    """
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def rng(seed: int, epoch: int, sample: int, purpose: str) -> np.random.Generator:
    """The stream of one sample in one epoch for one purpose (such as ``view0``)."""
    return np.random.Generator(np.random.Philox(key=key(seed, int(epoch), int(sample), purpose)))
