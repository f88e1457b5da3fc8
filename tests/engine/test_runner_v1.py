"""Model runner V1 with the fused kernels, as on a GPU, gives the tokens that it gives with the reference."""

import pytest

from tests.support.engines import HOWS, probe
from tests.support.totals import assert_totals
from tests.support.v1_probe import answered
from tests.support.v2_probe import assert_crowd_was_served
from vllm_bebop.kernels.backend import plain


@pytest.mark.parametrize("how", HOWS)
def test_answers_of_the_kernels_are_those_of_the_reference(how):
    kernels, reference = probe("tests.support.v1_probe", use_v2=False, how=how), answered(plain())
    assert kernels.pop("backend").startswith("Triton kernels")
    assert reference.pop("backend") == plain().name
    crowd = kernels.pop("crowd")
    assert_crowd_was_served(crowd)
    totals = kernels.pop("totals"), reference.pop("totals")
    assert_totals(totals[0], kernels["accepted"], kernels["num_finished"] if crowd["is_asynchronous"] else 0)
    assert_totals(totals[1], kernels["accepted"])
    if not crowd["is_asynchronous"]:
        for name in ("tokens", "entropy_nats", "drafts", "accepted", "target_only"):  # the overlap is only estimated
            assert totals[0][name] == pytest.approx(totals[1][name], rel=1e-4)
    assert kernels == reference
