"""Checksums of elements and fingerprints of models: equal for the same numbers, however they lie; else different."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_heads import config, head
from vllm_bebop import tensor_files
from vllm_bebop.tensor_files import CheckpointError, add_checksums, element_checksum, fingerprint


def _splitmix(value: int) -> int:
    value = (value + 1) * 0x9E3779B97F4A7C15 % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    return value ^ value >> 27


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_element_checksum_equals_integer_arithmetic(dtype):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = [int(b) % 2 ** (8 * dtype.itemsize) for b in tensor.view(integer).flatten()]
    expected = (35, sum(bits) % 2**64, sum(map(_splitmix, bits)) % 2**64)
    assert element_checksum(tensor, dtype) == expected


def test_element_checksum_ignores_order_shape_and_chunks(monkeypatch):
    tensor = torch.randn(64, 33)
    checksum = element_checksum(tensor, torch.bfloat16)
    shuffled = tensor.flatten()[torch.randperm(tensor.numel())]
    assert element_checksum(shuffled, torch.bfloat16) == checksum
    assert element_checksum(tensor.T, torch.bfloat16) == checksum
    monkeypatch.setattr(tensor_files, "_CHUNK_ELEMENTS", 100)
    assert element_checksum(tensor, torch.bfloat16) == checksum


def test_element_checksum_is_additive_as_fusing_is():
    q, k, v = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4, 16)
    parts = (element_checksum(part, torch.float16) for part in (q, k, v))
    assert add_checksums(*parts) == element_checksum(torch.cat([q, k, v]), torch.float16)
    assert add_checksums() == (0, 0, 0)


def test_element_checksum_catches_one_changed_element():
    tensor = torch.randn(1000).bfloat16()
    checksum = element_checksum(tensor, torch.bfloat16)
    bits = tensor.view(torch.int16)
    for index in range(0, 1000, 100):
        bits[index] ^= 1
        assert element_checksum(tensor, torch.bfloat16) != checksum
        bits[index] ^= 1
    # Plain sums miss changes that cancel out, which the mixed one does not.
    bits[0] += 1
    bits[1] -= 1
    changed = element_checksum(tensor, torch.bfloat16)
    assert changed[:2] == checksum[:2] and changed[2] != checksum[2]


def test_element_checksum_is_of_the_dtype_that_the_engine_holds():
    tensor = torch.tensor([1.0, 1.0 + 2**-20])
    assert element_checksum(tensor, torch.bfloat16) == element_checksum(torch.ones(2), torch.bfloat16)
    assert element_checksum(tensor, torch.float32) != element_checksum(torch.ones(2), torch.float32)


def _model(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config("qwen3_next")))
    names = sorted(tensors, reverse=shards > 1)
    for shard in range(shards):
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / f"{shard}.safetensors")
    return directory


@pytest.fixture
def backbone() -> dict[str, torch.Tensor]:
    shapes = {
        "model.embed_tokens.weight": (96, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.experts.0.up_proj.weight": (16, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (96, 64),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_fingerprint_ignores_sharding_and_the_head(tmp_path, backbone):
    expected = fingerprint(_model(tmp_path / "one", backbone))
    assert fingerprint(_model(tmp_path / "three", backbone, shards=3)) == expected
    assert fingerprint(_model(tmp_path / "with_head", backbone | head(config("qwen3_next")))) == expected


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.0.self_attn.o_proj", "model.norm", "lm_head"])
def test_fingerprint_tells_trained_weights(tmp_path, backbone, part):
    before, name = fingerprint(_model(tmp_path / "before", backbone)), f"{part}.weight"
    trained = backbone | {name: backbone[name] + 1e-3}
    assert fingerprint(_model(tmp_path / "after", trained)) != before


def test_fingerprint_tells_names_shapes_and_dtypes(tmp_path, backbone):
    expert = "model.layers.0.mlp.experts.0.up_proj.weight"  # not sampled: only its description counts
    variants = [
        backbone,
        {("renamed" if name == expert else name): tensor for name, tensor in backbone.items()},
        backbone | {expert: backbone[expert].T.contiguous()},
        backbone | {expert: backbone[expert].half()},
    ]
    prints = {fingerprint(_model(tmp_path / str(i), variant)) for i, variant in enumerate(variants)}
    assert len(prints) == len(variants)


def test_fingerprint_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(CheckpointError, match="absent: is not a directory"):
        fingerprint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        fingerprint(tmp_path)
