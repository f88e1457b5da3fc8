"""What must hold of an engine's running totals (`kernels.tally`)."""

import math


def assert_totals(totals, accepted, discarded_rounds=0):
    """Accepted as vLLM counts it, and as often as sum min(p, q) says, within four standard deviations.

    discarded_rounds: with asynchronous scheduling, at most so many that vLLM began before it knew of a request's end.
    """
    assert all(
        0 <= ours - theirs <= discarded_rounds for ours, theirs in zip(totals["accepted"], accepted, strict=True)
    )
    for drafts, hits, overlap in zip(totals["drafts"], totals["accepted"], totals["overlap"], strict=True):
        assert drafts > hits > 0
        assert abs(hits - overlap) < 4 * math.sqrt(drafts) / 2
