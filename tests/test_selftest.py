"""`bebop selftest` passes on an honest sampler, fails on a broken one. The kernels' laws: test_kernels_verification."""

from dataclasses import replace

import pytest
import torch

from vllm_bebop import selftest
from vllm_bebop.kernels import backend


@pytest.fixture(autouse=True)
def fewer_samples(monkeypatch):
    monkeypatch.setattr(selftest, "NUM_SAMPLES", 20_000)


def failures(sampler: backend.Backend) -> list[str]:
    return [name for name, passed, _ in selftest.run("cpu", sampler) if not passed]


def test_run_passes_and_says_which_sampler_it_tested():
    report = selftest.run("cpu", backend.plain())
    assert all(passed for _, passed, _ in report), report
    assert report[0][2].startswith("reference in plain torch on cpu")
    assert sum(name.startswith("fault caught") for name, _, _ in report) == len(selftest.FAULTS) >= 3


def test_run_fails_where_every_draft_is_accepted():
    def accept_all(*arguments, **options):
        out = backend.plain().verify(*arguments, **options)
        accepted = torch.cat([arguments[1], out.token_ids[:, 2:].clamp(min=0)], dim=1)
        return replace(out, token_ids=accepted, num_accepted=torch.full_like(out.num_accepted, 2))

    assert "laws of sampled drafts" in failures(replace(backend.plain(), verify=accept_all))


def test_run_fails_where_faults_pass_unnoticed(monkeypatch):
    monkeypatch.setitem(selftest.FAULTS, "none at all", selftest.Step)
    assert failures(backend.plain()) == ["fault caught: none at all"]


def test_pick_takes_the_reference_without_triton_on_the_device():
    assert backend.pick(torch.device("cuda")).name.startswith("Triton kernels")
    from vllm_bebop.kernels.launch import is_interpreted

    assert (backend.pick(torch.device("cpu")).name == backend.plain().name) is not is_interpreted()
