"""What the draft loader demands of a head after loading, on models small enough to be written down."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.support.engines import TINY_MODEL
from vllm_bebop.draft import DraftError, element_checksum
from vllm_bebop.engine import draft_loader, draft_shards
from vllm_bebop.engine.draft_loader import BebopDraftLoader, DefaultModelLoader

GROUPS = ("get_pp_group", "get_dp_group", "get_pcp_group")


@pytest.fixture
def world(monkeypatch):
    """Set the sizes of the parallel groups; 1 unless given."""

    def set_sizes(**sizes):
        for name in (*GROUPS, "get_tp_group"):
            group = SimpleNamespace(world_size=sizes.get(name, 1), rank_in_group=0, cpu_group=None)
            for module in (draft_loader, draft_shards):
                monkeypatch.setattr(module, name, lambda group=group: group, raising=module is draft_loader)

    set_sizes()
    return set_sizes


def _load(monkeypatch, parameters, stored):
    """Load a file of these tensors, by name, into a head of these parameters, by dotted name; what it then holds."""
    head = torch.nn.Module()
    for name, values in parameters.items():
        owner, (*path, last) = head, name.split(".")
        for part in path:
            owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if not isinstance(values, torch.nn.Parameter):
            values = torch.nn.Parameter(values, requires_grad=False)
        owner.register_parameter(last, values)

    def upstream(self, model, model_config):
        for name, tensor in self.get_all_weights(model_config, model):
            parameter = model.get_parameter(name.removeprefix("mtp."))
            if not parameter.is_meta:
                parameter.data[: len(tensor)].copy_(tensor[: len(parameter)])

    monkeypatch.setattr(DefaultModelLoader, "load_weights", upstream)
    monkeypatch.setattr(
        DefaultModelLoader, "get_all_weights", lambda *_: ((f"mtp.{name}", tensor) for name, tensor in stored.items())
    )
    config = json.loads((TINY_MODEL / "config.json").read_text())
    model_config = SimpleNamespace(
        model="org/head", dtype=torch.float32, hf_config=SimpleNamespace(to_dict=lambda: config)
    )
    object.__new__(BebopDraftLoader).load_weights(head, model_config)
    return dict(head.named_parameters())


def test_half_of_the_experts_is_too_little_on_one_rank(monkeypatch, world):
    whole = torch.randn(8)
    with pytest.raises(DraftError, match="the engine holds 4 elements that differ from the 8 in the file"):
        _load(monkeypatch, {"experts": torch.empty(4)}, {"experts": whole})
    _load(monkeypatch, {"experts": torch.empty(8)}, {"experts": whole})


@pytest.mark.parametrize("group", GROUPS)
def test_half_of_the_experts_is_a_ranks_share(monkeypatch, world, group):
    """vLLM spreads experts over data-parallel ranks too, with a tensor-parallel size of 1: nothing to compare."""
    world(**{group: 2})
    _load(monkeypatch, {"experts": torch.empty(4)}, {"experts": torch.randn(8)})
    with pytest.raises(DraftError, match="not .fully. loaded: experts"):
        _load(monkeypatch, {"experts": torch.empty(4)}, {})


@pytest.mark.parametrize(
    ("other_half", "complaint"),
    [
        (slice(4, 8), None),
        (slice(0, 4), "holds 8 elements that differ from the 8"),
        (slice(4, 7), "holds 7 elements that differ from the 8"),
        (slice(0, 8), None),  # 12 together, as with redundant copies of experts: a warning
    ],
)
def test_tensor_parallel_ranks_hold_the_file_together(monkeypatch, world, caplog, other_half, complaint):
    world(get_tp_group=2)
    whole = torch.randn(8)

    def gather(of_ranks, own, group):
        of_ranks[:] = own, element_checksum(whole[other_half], torch.float32)

    monkeypatch.setattr(draft_shards.dist, "all_gather_object", gather)
    with nullcontext() if complaint is None else pytest.raises(DraftError, match=complaint):
        _load(monkeypatch, {"experts.w13_weight": torch.empty(4)}, {"experts.w13_weight": whole})
    assert ("the ranks hold 12" in caplog.text) == (other_half == slice(0, 8))


def test_embedding_must_be_loaded_with_pipeline_parallelism(monkeypatch, world):
    """Elsewhere vLLM puts the target's in its place."""
    parameters, stored = {"fc": torch.empty(2), "embed_tokens.weight": torch.empty(2)}, {"fc": torch.randn(2)}
    _load(monkeypatch, parameters, stored)
    world(get_pp_group=2)
    with pytest.raises(DraftError, match="not .fully. loaded: embed_tokens.weight"):
        _load(monkeypatch, parameters, stored)


FP8, INT4 = torch.zeros(4).to(torch.float8_e4m3fn), torch.zeros(4, dtype=torch.int32)
ON_LOADING = torch.empty(4, device="meta")


@pytest.mark.parametrize(
    ("held", "stored"), [(FP8, FP8), (INT4, INT4), (ON_LOADING, torch.zeros(4))], ids=["fp8", "int4", "on loading"]
)
def test_quantised_head_is_loaded_unchecked(monkeypatch, world, held, stored):
    """Nothing that the file lacks may be overwritten with NaN, nor stop the start."""
    parameters = {"w": held, "scale": torch.ones(1), "norm": torch.empty(4)}
    loaded = _load(monkeypatch, parameters, {"w": stored, "norm": torch.arange(4.0)})
    assert loaded["scale"] == 1 and (loaded["norm"] == torch.arange(4)).all()


@pytest.mark.parametrize("held", [FP8, INT4], ids=["fp8", "int4"])
def test_unquantised_file_for_a_quantised_head_is_refused(monkeypatch, world, held):
    """vLLM would cast the weights and make up the scales."""
    with pytest.raises(DraftError, match="built a quantised head.*the draft is not quantised"):
        _load(monkeypatch, {"w": held}, {"w": torch.zeros(4)})


def test_scales_of_the_kv_cache_keep_their_defaults(monkeypatch, world):
    """A target in FP8 gives its head these parameters even where it leaves the head itself alone."""
    parameters = {"w": torch.empty(4), "attn.k_scale": torch.tensor([-1.0])}
    assert _load(monkeypatch, parameters, {"w": torch.arange(4.0)})["attn.k_scale"] == -1
    stored = {"w": torch.arange(4.0), "attn.k_scale": torch.tensor([0.5])}
    assert _load(monkeypatch, parameters, stored)["attn.k_scale"] == 0.5


def test_padding_of_experts_may_be_unwritten(monkeypatch, world):
    """vLLM rounds experts up for some kernels. What is no padding must still be there, to the last element."""
    stored = {"experts.w2_weight": torch.arange(6.0)}

    def load(padding):
        held = torch.nn.Parameter(torch.empty(8), requires_grad=False)
        held.weight_loader_numel = 8 - padding
        return _load(monkeypatch, {"experts.w2_weight": held}, stored)["experts.w2_weight"]

    assert load(padding=2).tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    with pytest.raises(DraftError, match="not .fully. loaded: experts.w2_weight"):
        load(padding=1)
    with pytest.raises(DraftError, match="holds 5 elements that differ from the 6"):
        load(padding=3)
