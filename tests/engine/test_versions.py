"""The gate: an untested vLLM is refused, and so is a tested one that differs, by the names of what differs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from vllm_bebop.config import BebopConfigError
from vllm_bebop.engine import versions, worker
from vllm_bebop.engine.versions import Seam


def test_installed_vllm_has_every_seam():
    assert versions.missing_seams() == []


@pytest.mark.parametrize("version", ["0.99.0", "1.32.0", "0.3.2"])
def test_untested_version_is_refused(monkeypatch, version):
    monkeypatch.delenv("VLLM_BEBOP_CANDIDATE", raising=False)
    monkeypatch.setattr(versions, "installed_vllm", lambda: version)
    with pytest.raises(BebopConfigError, match=f"vLLM {version} has not been tested with bebop; supported: 0.24"):
        versions.require_supported_vllm()
    monkeypatch.setenv("VLLM_BEBOP_CANDIDATE", version.rsplit(".", 1)[0])
    monkeypatch.setattr(versions, "missing_seams", lambda: [])
    versions.require_supported_vllm()


@pytest.mark.parametrize(("version", "is_refused"), [("0.26.0", True), ("0.27.0", False)])
def test_model_runner_v2_is_refused_where_it_cannot_be_had(monkeypatch, version, is_refused):
    monkeypatch.setattr(versions, "installed_vllm", lambda: version)
    monkeypatch.setattr(versions, "missing_seams", lambda: [])
    versions.require_supported_vllm()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(BebopConfigError, match="set VLLM_USE_V2_MODEL_RUNNER=0") if is_refused else nullcontext():
        versions.require_supported_vllm()
    # Where it is the model's default, the worker finds out.
    with pytest.raises(BebopConfigError, match="set VLLM_USE_V2_MODEL_RUNNER=0") if is_refused else nullcontext():
        worker._runner_module(SimpleNamespace(use_v2_model_runner=True))


@pytest.mark.parametrize(
    ("seam", "problem"),
    [
        (
            Seam("vllm.v1.sample.sampler:Sampler.sample", ("logits", "mood"), "a.py"),
            "Sampler.sample no longer takes mood",
        ),
        (Seam("vllm.v1.sample.sampler:Sampler.absent", (), "a.py"), "Sampler.absent is missing"),
        (Seam("vllm.no_such_module:function", (), "a.py"), "vllm.no_such_module:function is missing"),
    ],
)
def test_changed_upstream_is_refused_by_name(monkeypatch, seam, problem):
    monkeypatch.setattr(versions, "installed_vllm", lambda: versions.TESTED_VERSIONS[0] + ".0")
    monkeypatch.setattr(versions, "_RUNNER_V1", (*versions._RUNNER_V1, seam))
    with pytest.raises(
        BebopConfigError, match=f"differs from the one bebop was tested on: [^;]*{problem}.*needed by a.py"
    ):
        versions.require_supported_vllm()
    ((_, passed, detail),) = [row for row in versions.check_versions() if row[0] == "vLLM's seams"]
    assert not passed and problem in detail


def test_either_name_of_a_parameter_will_do(monkeypatch):
    either = Seam("vllm.v1.sample.sampler:Sampler.sample", ("mood|logits",), "a.py")
    monkeypatch.setattr(versions, "_RUNNER_V1", (either,))
    assert versions.missing_seams() == []
