"""Counter-based random numbers: a (seed, position, stream, index) gives the same number in any batch on any device.

Every random choice of the sampler names the number it uses instead of taking the next one from a generator. A request's
tokens therefore do not depend on its neighbours in the batch, and the fused kernels can repeat the reference exactly:
`philox_4x32(seed, c0, c1, c2, c3)` returns the words of `tl.philox(seed, c0, c1, c2, c3)` with 32-bit counters.

    key     = 64-bit seed of the request                  (k0 = low word, k1 = high word)
    counter = (index, position, stream, attempt // 4)     (c0 .. c3, 32 bits each)
    uniform = ((word >> 9) + 0.5) * 2**-23                (of word attempt % 4; exact in fp32; 2**-24 to 1 - 2**-24)
    gumbel  = -log(-log(uniform))                         (always finite; from -2.8 to 16.6)

Equal numbers go to the lower id: with 23 bits, the first of 512 equal tokens is 3e-5 too likely, relatively, which is
8e-6 in total variation; to notice it takes some 10**9 draws.

`position` is the absolute position of the token being decided. `attempt` counts thinning rounds, four of which are one
block of Philox. Under block verification it is the round's first position where a draft is drawn or accepted (see
`block_reference`); 0 elsewhere.
"""

from enum import IntEnum

import torch
from torch import Tensor

_WORD_MASK = 0xFFFFFFFF
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_NUM_ROUNDS = 10


class Stream(IntEnum):
    """What a random number is for. Numbers of different streams are independent, so no two decisions share noise."""

    DRAFT_BLOCK = 0  # index = sub-block
    DRAFT_TOKEN = 1  # index = the token's place in its sub-block, as for every *_TOKEN stream
    ACCEPT = 2  # index = 0
    TARGET_BLOCK = 3
    TARGET_TOKEN = 4
    THINNING_BLOCK = 5  # the three thinning streams count attempts
    THINNING_TOKEN = 6
    THINNING_KEEP = 7
    RESIDUAL_BLOCK = 8
    RESIDUAL_TOKEN = 9


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of multiplier * word, for a multiplier in [2**31, 2**32) and words in [0, 2**32)."""
    # The 64-bit product does not fit a signed int64. With multiplier = 2**32 - m it equals word * 2**32 - m * word,
    # and m * word < 2**63 does fit.
    product = word * (multiplier - 2**32)
    return (product >> 32) + word, product & _WORD_MASK


def philox_4x32(
    seed: Tensor, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011), the generator behind `tl.philox`.

    Args:
        seed: int64, any shape; its 64 bits are the key.
        c0, c1, c2, c3: int64 tensors or ints that broadcast with `seed`; the low 32 bits count.
    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    Memory: about ten int64 temporaries of the broadcast shape.
    """
    device = seed.device
    counters = [torch.as_tensor(c, dtype=torch.int64, device=device) & _WORD_MASK for c in (c0, c1, c2, c3)]
    seed, w0, w1, w2, w3 = torch.broadcast_tensors(seed, *counters)
    k0, k1 = seed & _WORD_MASK, (seed >> 32) & _WORD_MASK
    for _ in range(_NUM_ROUNDS):
        high_0, low_0 = _multiply_high_low(_MULTIPLIER_0, w0)
        high_1, low_1 = _multiply_high_low(_MULTIPLIER_1, w2)
        w0, w1, w2, w3 = high_1 ^ w1 ^ k0, low_1, high_0 ^ w3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEP_0) & _WORD_MASK, (k1 + _KEY_STEP_1) & _WORD_MASK
    return w0, w1, w2, w3


def uniform(
    seed: Tensor, position: Tensor, stream: Stream, index: Tensor | int = 0, attempt: Tensor | int = 0
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), never 0 or 1, so that their logarithms are finite and negative.

    Args:
        seed, position: int64, broadcastable.
        stream: what the number is for.
        index: which number of the stream (sub-block, or place in it); broadcasts with `seed`.
        attempt: thinning round, or the round of block verification; broadcasts with `seed`.
    Returns:
        fp32 tensor of the broadcast shape: odd multiples of 2**-24, a step of 2**-23 apart. Each operation is exact in
        fp32, so any IEEE device gives the same bits.
    """
    words = philox_4x32(seed, index, position, int(stream), attempt >> 2)
    if isinstance(attempt, int):
        word = words[attempt & 3]
    else:
        word = torch.stack(words, dim=-1).gather(-1, (attempt & 3).expand_as(words[0])[..., None]).squeeze(-1)
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(
    seed: Tensor,
    position: Tensor,
    stream: Stream,
    index: Tensor | int = 0,
    attempt: Tensor | int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard Gumbel numbers: argmax(log w + gumbel) is i with probability w_i / sum(w).

    Arguments as for `uniform`; `dtype` (fp32 or fp64) is the precision of the two logarithms.
    """
    return -(-uniform(seed, position, stream, index, attempt).to(dtype).log()).log()
