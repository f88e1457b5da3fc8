"""What must hold of an engine's running totals (`kernels.tally`)."""

import math


def assert_totals(totals, accepted):
    """Accepted as vLLM counts it, and as often as sum min(p, q) says, within four standard deviations."""
    assert totals["accepted"] == accepted
    for drafts, hits, overlap in zip(totals["drafts"], totals["accepted"], totals["overlap"], strict=True):
        assert drafts > hits > 0
        assert abs(hits - overlap) < 4 * math.sqrt(drafts) / 2
