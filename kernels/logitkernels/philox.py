"""Random numbers that are functions of a counter and a key.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def philox_uniform(seed: int, stream: int, position: int) -> float:
    """Return a number in [0, 1) from the counter (position, stream) under the key ``seed`` (64 bits).

    A draw needs no state, so it cannot depend on other draws.
    """
    words = philox4x32((position & 0xFFFFFFFF, position >> 32, stream, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return float((words[0] << 32 | words[1]) >> 11) / 2.0**53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Apply ten rounds of Philox4x32 to a counter of four 32-bit words."""
    c0, c1, c2, c3 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (product_1 >> 32) ^ c1 ^ key_0, product_1 & _LOW_32
        c2, c3 = (product_0 >> 32) ^ c3 ^ key_1, product_0 & _LOW_32
        key_0, key_1 = (key_0 + _KEY_STEPS[0]) & _LOW_32, (key_1 + _KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3
