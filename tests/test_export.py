"""A trained head on disk: as a draft, and stitched into a full checkpoint whose every tensor is where it was."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from tests.support.tiny_heads import CONFIGS, config, head
from vllm_bebop import merge as merging
from vllm_bebop.draft import DraftError, draft_config, fingerprint, read_draft, write_draft
from vllm_bebop.families import recognise
from vllm_bebop.merge import MergeError, merge
from vllm_bebop.tensor_files import list_tensors, read_json
from vllm_bebop.train.export import checkpoint_dtype, export_draft
from vllm_bebop.train.heads import head_tensors, load_head, new_head

INDEX = "model.safetensors.index.json"
TARGET = config("qwen3_next")
FC = "mtp.fc.weight"


def backbone(seed: int = 0) -> dict[str, torch.Tensor]:
    """Some of a target's tensors, of dtypes that a head may not have too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(96, 64, generator=generator).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(48, 64, generator=generator).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.randn(1, 1, generator=generator),
        "model.layers.1.mlp.gate.bias": torch.randn(3, generator=generator).bfloat16(),  # an odd number of bytes / 4
        "model.layers.1.counter": torch.tensor(7),
        "lm_head.weight": torch.randn(96, 64, generator=generator).bfloat16(),
    }


def save_target(directory: Path, config_json, tensors, shards: int = 1) -> Path:
    """A checkpoint as Transformers writes it; shards > 1: with an index, the tensors dealt out in turn."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json))
    (directory / "tokenizer.json").write_text('{"model": "bpe"}')
    (directory / "modeling.py").write_text("raise SystemExit")
    (directory / "pytorch_model.bin").write_bytes(b"pickled")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Through the index, as loaders do."""
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    files = {file: load_file(directory / file) for file in set(weight_map.values())}
    assert sum(map(len, files.values())) == len(weight_map), "a tensor that the index does not name"
    assert {path.name for path in directory.glob("*.safetensors")} == set(files)
    return {name: files[file][name] for name, file in weight_map.items()}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.ravel().view(torch.uint8), theirs.ravel().view(torch.uint8))


@pytest.fixture
def draft(tmp_path) -> Path:
    return write_draft(tmp_path / "draft", head(TARGET), TARGET).path


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory of a target that lost its head on saving, its model, a trained fp32 head)."""
    torch.manual_seed(0)
    tiny = Qwen3NextConfig(
        **{key: value for key, value in TARGET.items() if key not in ("model_type", "architectures")},
        num_nextn_predict_layers=1,
    )
    model = Qwen3NextForCausalLM(tiny).eval().requires_grad_(False)
    directory = tmp_path_factory.mktemp("models") / "target"
    model.bfloat16().save_pretrained(directory)
    model = Qwen3NextForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    return directory, model, new_head(model)


def test_export_draft_reads_back_rounded_to_the_checkpoints_dtype(trained, tmp_path):
    directory, model, fp32 = trained
    assert next(fp32.parameters()).dtype == torch.float32
    metadata = {"loss": "e2e_tv", "steps": 12, "gamma": 5, "sampling": {"temperature": 0.8, "top_k": 20}}
    export_draft(fp32, directory, tmp_path / "draft", metadata)
    found = read_draft(tmp_path / "draft", read_json(directory / "config.json"), directory)
    assert not found.warnings
    assert found.metadata == {"format_version": 1, "base_fingerprint": fingerprint(directory), **metadata}
    written, expected = dict(found.weights()), head_tensors(fp32)
    assert written.keys() == expected.keys()
    assert all(same(written[name], expected[name].detach().bfloat16()) for name in expected)
    again = head_tensors(load_head(tmp_path / "draft", model))
    torch.testing.assert_close(again[FC], expected[FC], rtol=1e-2, atol=1e-2)


def test_export_draft_keeps_the_routers_bias_in_fp32(tmp_path):
    """Its entries differ by less than bf16 can tell apart at their size."""
    bias = 10 + 0.01 * torch.arange(4)
    for family in ("glm4_moe", "deepseek_v3"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(family)), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / family)
        trained = new_head(model, torch.float32)
        (name,) = (name for name in head_tensors(trained) if name.endswith("e_score_correction_bias"))
        head_tensors(trained)[name].copy_(bias)
        written = dict(export_draft(trained, tmp_path / family, tmp_path / f"{family}-draft", {}).weights())
        assert same(written[name], bias)
        assert same(head_tensors(load_head(tmp_path / f"{family}-draft", model))[name], bias)
        assert all(tensor.dtype == torch.bfloat16 for other, tensor in written.items() if other != name)


@torch.no_grad()
def test_export_draft_replaces_only_a_draft_of_ours(trained, tmp_path):
    directory, model, fp32 = trained
    export_draft(fp32, directory, tmp_path / "draft", {"loss": "ce"})
    export_draft(fp32, directory, tmp_path / "draft", {"loss": "tv"})
    assert read_json(tmp_path / "draft" / "bebop.json")["loss"] == "tv"
    broken = new_head(model)
    head_tensors(broken)[FC][0, 0] = torch.nan
    with pytest.raises(DraftError, match="mtp.fc.weight has 1 NaN"):
        export_draft(broken, directory, tmp_path / "draft", {"loss": "broken"})
    assert read_json(tmp_path / "draft" / "bebop.json")["loss"] == "tv"
    with pytest.raises(DraftError, match="not ours to replace"):
        export_draft(fp32, directory, directory, {})
    assert (directory / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("config_json", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
    ],
)
def test_checkpoint_dtype(config_json, dtype):
    assert checkpoint_dtype(config_json) == dtype


def test_checkpoint_dtype_refuses_what_no_head_is_stored_in():
    with pytest.raises(DraftError, match="'float8_e4m3fn' is none of bfloat16"):
        checkpoint_dtype({"dtype": "float8_e4m3fn"})


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("old_head", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_merge_holds_the_targets_tensors_and_the_drafts(tmp_path, model_type, old_head, shards):
    family = recognise(config(model_type))
    whole = config(model_type, **{family.layer_count_key: 1})
    target_config = whole if old_head else config(model_type, **{family.layer_count_key: 0})
    old = {name: tensor * 2 for name, tensor in head(whole).items()} if old_head else {}
    # A copy of the target's embedding among the head is the target's own and stays.
    copies = {family.prefixes(whole)[0] + name: torch.ones(2) for name in family.copies[:1]}
    target = save_target(tmp_path / "target", target_config, backbone() | copies | old, shards)
    draft = write_draft(tmp_path / "draft", head(whole), draft_config(whole))

    merged = merge(target, draft.path, tmp_path / "merged")

    assert (merged.path, merged.num_head_tensors, merged.num_replaced) == (
        tmp_path / "merged",
        len(head(whole)),
        len(old),
    )
    expected = backbone() | copies | head(whole)
    found = read_all(merged.path)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    assert json.loads((merged.path / "config.json").read_text()) == whole
    assert fingerprint(merged.path) == fingerprint(target)
    others = {path.name for path in merged.path.iterdir() if "safetensors" not in path.name}
    assert others == {"config.json", "tokenizer.json", "modeling.py"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "merged", "target"]


def test_merge_rewrites_only_shards_that_held_the_old_head(tmp_path, draft):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    old = {name: tensor * 2 for name, tensor in head(TARGET).items()}
    target = save_target(tmp_path / "target", TARGET, backbone() | old, 2)
    save_file(backbone() | old, target / second)  # every head tensor in the second shard
    save_file({"model.norm.weight": torch.ones(64)}, target / first, {"kept": "yes"})
    weight_map = {"model.norm.weight": first} | dict.fromkeys(backbone() | old, second)
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    merge(target, draft, tmp_path / "merged")
    assert (tmp_path / "merged" / first).read_bytes() == (target / first).read_bytes()
    assert (tmp_path / "merged" / first).stat().st_ino != (target / first).stat().st_ino
    assert load_file(tmp_path / "merged" / second).keys() == backbone().keys()
    assert load_file(tmp_path / "merged" / "mtp.safetensors").keys() == old.keys()


def test_merge_replaces_a_shard_that_holds_nothing_but_the_old_head(tmp_path, draft):
    target = save_target(tmp_path / "target", TARGET, backbone())
    save_file({name: tensor * 2 for name, tensor in head(TARGET).items()}, target / "mtp.safetensors")
    again = merge(target, draft, tmp_path / "merged")
    assert again.num_replaced == len(head(TARGET))
    files = {"model-00001-of-00001.safetensors", "mtp.safetensors"}
    assert set(json.loads((again.path / INDEX).read_text())["weight_map"].values()) == files
    assert same(read_all(again.path)[FC], head(TARGET)[FC])
    assert same(read_all(merge(again.path, draft, tmp_path / "twice").path)[FC], head(TARGET)[FC])


def test_merge_does_not_take_the_name_of_a_shard(tmp_path, draft):
    target = save_target(tmp_path / "target", TARGET, backbone())
    (target / "model.safetensors").rename(target / "mtp.safetensors")
    assert read_all(merge(target, draft, tmp_path / "merged").path).keys() == (backbone() | head(TARGET)).keys()


def test_merged_checkpoint_loads_in_transformers(trained, tmp_path):
    directory, model, fp32 = trained
    export_draft(fp32, directory, tmp_path / "draft", {})
    merge(directory, tmp_path / "draft", tmp_path / "merged")
    loaded = Qwen3NextForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    ours, theirs = (head_tensors(load_head(tmp_path / name, model)) for name in ("draft", "merged"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merge_refuses_and_leaves_nothing_behind(tmp_path, draft):
    target = save_target(tmp_path / "target", TARGET, backbone())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MergeError, match="target: exists: choose another directory"):
        merge(target, draft, target)
    with pytest.raises(MergeError, match="absent: no such directory: give the target's"):
        merge(tmp_path / "absent", draft, tmp_path / "out")
    with pytest.raises(MergeError, match="absent: no such directory: give the draft's"):
        merge(target, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(DraftError, match="'eagle3'"):
        merge(target, draft, tmp_path / "eagle3")
    with pytest.raises(MergeError, match="model_type 'llama'"):
        merge(save_target(tmp_path / "llama", {"model_type": "llama"}, backbone()), draft, tmp_path / "out")
    shutil.rmtree(tmp_path / "llama")
    (target / "config.json").write_text(json.dumps(config("qwen3_next", vocab_size=999)))
    with pytest.raises(DraftError, match="vocab_size is 96, the target's is 999"):
        merge(target, draft, tmp_path / "out")
    (target / "config.json").write_text(json.dumps(TARGET))
    data = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(MergeError, match="model.safetensors: truncated"):
        merge(target, draft, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_merge_warns_about_a_draft_of_other_weights(tmp_path):
    target = save_target(tmp_path / "target", TARGET, backbone())
    made = write_draft(tmp_path / "draft", head(TARGET), TARGET, {"base_fingerprint": "0" * 64})
    (warning,) = merge(target, made.path, tmp_path / "merged").warnings
    assert "trained for a base model with fingerprint 000000000000" in warning


@pytest.mark.parametrize("name", [FC, "lm_head.weight", "model.layers.1.counter"])
def test_merge_compares_every_tensor_after_writing(tmp_path, draft, name, monkeypatch):
    """The planted fault: one bit of one tensor flips on its way to the disk."""
    target = save_target(tmp_path / "target", TARGET, backbone())
    verify = merging._verify

    def flip_a_bit_first(directory, sources, progress):
        entry = list_tensors(directory)[0][name]
        with entry.file.open("r+b") as file:
            file.seek(entry.end - 1)
            byte = file.read(1)[0]
            file.seek(entry.end - 1)
            file.write(bytes([byte ^ 16]))
        verify(directory, sources, progress)

    monkeypatch.setattr(merging, "_verify", flip_a_bit_first)
    with pytest.raises(MergeError, match=f"{name} reads back differently than it was written"):
        merge(target, draft, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "target"]


def test_merge_on_a_full_disk_leaves_nothing_behind(tmp_path, draft, monkeypatch):
    target = save_target(tmp_path / "target", TARGET, backbone())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(MergeError, match="100 are free there"):
        merge(target, draft, tmp_path / "merged")
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        merge(target, draft, tmp_path / "merged")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "target"]


def test_merge_copies_by_itself_where_the_kernel_does_not(tmp_path, draft, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(merging, "_CHUNK_BYTES", 1000)
    target = save_target(tmp_path / "target", TARGET, backbone() | head(TARGET), 2)
    found = read_all(merge(target, draft, tmp_path / "merged").path)
    expected = backbone() | head(TARGET)
    assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
