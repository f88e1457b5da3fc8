"""Drafts on disk: what is written reads back, and every bad one is refused with its reason."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_heads import CONFIGS, config, head
from vllm_bebop.draft import (
    DraftError,
    draft_config,
    fingerprint,
    head_tensor_names,
    inspect_checkpoint_head,
    read_draft,
    refuse_misread_path,
    refuse_quantised_head,
    resolve_draft,
    write_draft,
)
from vllm_bebop.families import PER_EXPERT, STACKED

FC = "mtp.fc.weight"
TARGET = config("qwen3_next")


def save(directory: Path, tensors=None, config_json=TARGET, shards=1) -> Path:
    """A draft as some other tool might have written it: no checks."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json))
    tensors = head(TARGET) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    index: dict[str, str] = {}
    for shard in range(shards):
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, directory / f"{shard}.safetensors")
        index |= dict.fromkeys(part, f"{shard}.safetensors")
    set_index(directory, index)
    return directory


def set_index(directory: Path, weight_map) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refused(path: Path, target=TARGET) -> str:
    with pytest.raises(DraftError) as error:
        read_draft(path, target)
    assert str(path) in str(error.value)
    return "\n".join(error.value.problems)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize(
    ("model_type", "layout"),
    [*((name, None) for name in CONFIGS), ("qwen3_next", STACKED), ("qwen3_5_moe", PER_EXPERT)],
)
def test_write_draft_reads_back(tmp_path, model_type, shard_bytes, layout):
    target = config(model_type)
    tensors = head(target, layout)
    metadata = {"loss": "tv", "steps": 3, "sampling": {"temperature": 1.0, "top_p": 0.95}}
    written = write_draft(tmp_path / "draft", tensors, target, metadata, shard_bytes=shard_bytes)
    draft = read_draft(tmp_path / "draft", target)
    assert draft == written
    assert draft.num_layers == 1 and not draft.warnings
    assert draft.metadata == {"format_version": 1, **metadata}
    read = dict(draft.weights())
    assert read.keys() == tensors.keys() == head_tensor_names(tmp_path / "draft", target)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert (len(list((tmp_path / "draft").glob("*.safetensors"))) > 1) == (shard_bytes < 1 << 30)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"], "temporary files were left behind"


def test_write_draft_overwrites_only_a_draft_and_only_when_asked(tmp_path):
    write_draft(tmp_path / "draft", head(TARGET), TARGET)
    with pytest.raises(DraftError, match="exists: choose another directory or pass overwrite=True"):
        write_draft(tmp_path / "draft", head(TARGET), TARGET)
    changed = head(TARGET) | {FC: torch.zeros(64, 128)}
    assert write_draft(tmp_path / "draft", changed, TARGET, overwrite=True).tensors[FC].dtype == "F32"
    (tmp_path / "precious").mkdir()
    with pytest.raises(DraftError, match="holds no bebop.json: not ours to replace"):
        write_draft(tmp_path / "precious", head(TARGET), TARGET, overwrite=True)


def test_write_draft_leaves_nothing_behind_when_it_refuses(tmp_path):
    write_draft(tmp_path / "draft", head(TARGET), TARGET)
    before = dict(read_draft(tmp_path / "draft", TARGET).weights())
    bad = head(TARGET) | {FC: torch.full((64, 128), torch.nan)}
    with pytest.raises(DraftError, match=r"draft: mtp.fc.weight has 8192 NaN"):
        write_draft(tmp_path / "draft", bad, TARGET, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]
    assert torch.equal(before[FC], dict(read_draft(tmp_path / "draft", TARGET).weights())[FC])


def test_draft_config_is_the_targets_unquantised(tmp_path):
    target = config("qwen3_5", mtp_num_hidden_layers=0) | {"quantization_config": {"quant_method": "fp8"}}
    made = draft_config(target, num_layers=1)
    assert made == config("qwen3_5")
    assert "quantization_config" in target


def test_copies_of_the_targets_tensors_are_ignored(tmp_path):
    copies = {"lm_head.weight": torch.zeros(96, 64), "model.embed_tokens.weight": torch.zeros(96, 64)}
    draft = read_draft(save(tmp_path / "d", head(TARGET) | copies), TARGET)
    assert draft.ignored == tuple(sorted(copies))
    assert not copies.keys() & dict(draft.weights()).keys()


# --- refusals: the directory and its config ---------------------------------------------------------------------------


def test_refuses_what_is_no_directory(tmp_path):
    assert "no such directory" in refused(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "is a file, not a directory" in refused(tmp_path / "file")


@pytest.mark.parametrize(
    ("config_json", "reason"),
    [
        (None, "config.json is missing: copy it from the target model"),
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds a list, not a JSON object"),
        ('{"model_type": "llama"}', "model_type 'llama' .* has no MTP head that is supported"),
        ('{"model_type": "glm4_moe"}', "config.json has no 'num_hidden_layers', which fixes the shapes"),
    ],
)
def test_refuses_a_bad_config(tmp_path, config_json, reason):
    directory = save(tmp_path / "d")
    (directory / "config.json").unlink()
    if config_json is not None:
        (directory / "config.json").write_text(config_json)
    with pytest.raises(DraftError, match=reason):
        read_draft(directory, TARGET)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads", "num_experts", "head_dim"])
def test_refuses_sizes_that_are_not_the_targets(tmp_path, key):
    target = config("qwen3_next", **{key: 999})
    message = refused(save(tmp_path / "d"), target)
    assert f"{key} is {TARGET[key]}, the target's is 999: the draft belongs to another model" in message


def test_refuses_another_family(tmp_path):
    message = refused(save(tmp_path / "d"), config("glm4_moe"))
    assert "describes a Qwen3-Next head, the target is GLM-4.x MoE: use another draft" in message


def test_refuses_a_config_without_mtp_layers(tmp_path):
    none = config("qwen3_next", num_nextn_predict_layers=0)
    assert "num_nextn_predict_layers = 0: set it to" in refused(save(tmp_path / "d", config_json=none))
    # vLLM 0.32 builds the head after the target's config, whatever the draft's says.
    assert "the target's says 0, and vLLM builds the head after the target's" in refused(save(tmp_path / "e"), none)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("?", "bebop.json is not valid JSON"), ('{"format_version": 2}', "format_version 2 is not 1")],
)
def test_refuses_bad_metadata(tmp_path, content, reason):
    (save(tmp_path / "d") / "bebop.json").write_text(content)
    assert reason in refused(tmp_path / "d")


@pytest.mark.parametrize("name", ["my-eagle-1", "EAGLE3-run", "qwen_dflash", "dspark"])
def test_refuses_a_path_that_vllm_takes_for_another_method(tmp_path, name):
    assert "rename the directory" in refused(save(tmp_path / name / "draft"))
    with pytest.raises(DraftError, match="from which vLLM concludes method"):
        refuse_misread_path(tmp_path / name)
    refuse_misread_path(tmp_path / "beagle")


# --- refusals: the files ----------------------------------------------------------------------------------------------


def test_refuses_pickles_by_name(tmp_path):
    (save(tmp_path / "d") / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refused(tmp_path / "d")
    (tmp_path / "d" / "pytorch_model.bin").touch()
    assert "only pickles (pytorch_model.bin), which can run code" in refused(tmp_path / "d")


def _truncate_data(data: bytes) -> bytes:
    return data[:-100]


def _truncate_header(data: bytes) -> bytes:
    return data[:50]


def _garble_header(data: bytes) -> bytes:
    return data[:8] + b"\xff" * 20 + data[28:]


def _huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + data[8:]


def _shift_offsets(data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[FC]["shape"][0] += 1
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate_data, "model.safetensors: truncated at"),
        (_truncate_header, "model.safetensors: truncated at 50 bytes, inside its header"),
        (lambda data: b"", "model.safetensors: truncated at 0 bytes"),
        (lambda data: data + b"\0", "model.safetensors: 1 bytes too long"),
        (_garble_header, "model.safetensors: the safetensors header is corrupted"),
        (_huge_header, "model.safetensors: the safetensors header is corrupted"),
        (_shift_offsets, "model.safetensors: the safetensors header is corrupted"),
    ],
)
def test_refuses_a_damaged_file(tmp_path, damage, reason):
    file = save(tmp_path / "d") / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert reason in refused(tmp_path / "d")


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({FC: "../x.safetensors"}, "names '../x.safetensors', outside the directory"),
        ({FC: "/etc/x.safetensors"}, "names '/etc/x.safetensors', outside the directory"),
        ({FC: "2.safetensors"}, "2.safetensors is missing, though model.safetensors.index.json names it"),
        ({FC: "model.bin"}, "names 'model.bin': only .safetensors files are read"),
        ({"mtp.absent": "0.safetensors"}, "says that mtp.absent is in 0.safetensors, which does not hold it"),
        ({FC: 1}, "weight_map must map tensor names to file names"),
        ({}, "holds no .safetensors file"),
    ],
)
def test_refuses_a_bad_index(tmp_path, weight_map, reason):
    set_index(save(tmp_path / "d", shards=2), weight_map)
    assert reason in refused(tmp_path / "d")


def test_refuses_a_tensor_in_two_files(tmp_path):
    save_file({FC: torch.zeros(64, 128)}, save(tmp_path / "d") / "more.safetensors")
    assert f"{FC} is in both model.safetensors and more.safetensors: keep one" in refused(tmp_path / "d")


def test_refuses_links_out_of_the_directory_but_not_the_hub_caches(tmp_path):
    blob = save(tmp_path / "models--org--d" / "blobs") / "model.safetensors"
    plain = save(tmp_path / "plain")
    snapshot = save(tmp_path / "models--org--d" / "snapshots" / "abc")
    for directory in (plain, snapshot):
        (directory / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    assert read_draft(snapshot, TARGET).num_layers == 1
    (plain / "model.safetensors").symlink_to(blob)
    assert f"model.safetensors is a link to {blob.resolve()}, outside the directory" in refused(plain)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(save(tmp_path / "elsewhere") / "model.safetensors")
    assert "outside the directory" in refused(snapshot)


# --- refusals: the tensors --------------------------------------------------------------------------------------------


def _edit(**changes):
    """The head with tensors replaced, or removed where the new value is None."""
    tensors = head(TARGET)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({FC: None}, f"the Qwen3-Next head lacks 1 tensors: {FC}"),
        (
            {"mtp.layers.0.mlp.experts.3.up_proj.weight": None, "mtp.norm.weight": None},
            "lacks 2 tensors: mtp.layers.0.mlp.experts.3.up_proj.weight, mtp.norm.weight",
        ),
        ({"mtp.extra.weight": torch.zeros(2)}, "unexpected tensors: mtp.extra.weight"),
        ({"model.layers.0.q.weight": torch.zeros(2)}, "a draft holds only the head, mtp.*, not the target's backbone"),
        ({"mtp.fc.weight_scale": torch.zeros(2)}, "mtp.fc.weight_scale; the head is quantised"),
        ({"mtp.layers.0.self_attn.k_scale": torch.ones(1)}, "unexpected tensors: mtp.layers.0.self_attn.k_scale"),
        ({FC: torch.zeros(64, 64)}, f"{FC} has shape [64, 64], config.json implies [64, 128]"),
        ({FC: torch.zeros(64, 128, dtype=torch.int8)}, f"unsupported dtype I8 of {FC}: store bf16, fp16 or fp32"),
        ({FC: torch.zeros(64, 128).to(torch.float8_e4m3fn)}, f"unsupported dtype F8_E4M3 of {FC}"),
        ({FC: torch.zeros(64, 128, dtype=torch.float64)}, f"unsupported dtype F64 of {FC}"),
        ({FC: torch.zeros(64, 128).index_fill(0, torch.tensor(3), torch.nan)}, f"{FC} has 128 NaN or infinite values"),
        ({"mtp.norm.weight": torch.full((64,), -torch.inf)}, "mtp.norm.weight has 64 NaN or infinite values among 64"),
    ],
)
def test_refuses_bad_tensors(tmp_path, changes, reason):
    assert reason in refused(save(tmp_path / "d", _edit(**changes)))


def test_scales_of_the_kv_cache_may_stand_beside_a_quantised_target(tmp_path):
    """vLLM takes them up there, and nowhere else."""
    scale = "mtp.layers.0.self_attn.k_scale"
    tensors, target = _edit(**{scale: torch.ones(1)}), TARGET | {"quantization_config": {"quant_method": "fp8"}}
    assert scale in read_draft(save(tmp_path / "draft", tensors), target).tensors
    assert scale in inspect_checkpoint_head(save(tmp_path / "target", tensors, target)).tensors


def test_reports_every_problem_at_once(tmp_path):
    tensors = _edit(**{FC: None, "mtp.norm.weight": torch.full((64,), torch.nan), "mtp.more": torch.zeros(1)})
    message = refused(save(tmp_path / "eagle3", tensors), config("qwen3_next", vocab_size=1))
    for reason in ("'eagle3'", "vocab_size is 96", f"lacks 1 tensors: {FC}", "mtp.norm.weight has 64", "mtp.more"):
        assert reason in message


# --- the target -------------------------------------------------------------------------------------------------------


def test_inspect_checkpoint_head(tmp_path):
    backbone = {"model.layers.0.mlp.gate.weight": torch.zeros(4, 64), "model.embed_tokens.weight": torch.zeros(96, 64)}
    report = inspect_checkpoint_head(save(tmp_path / "whole", head(TARGET) | backbone, shards=2))
    assert (report.num_layers, report.tensors.keys(), report.quantised) == (1, head(TARGET).keys(), False)
    with pytest.raises(DraftError, match=r"no tensor is named mtp\.\*: the head was lost on export; add a draft"):
        inspect_checkpoint_head(save(tmp_path / "exported", backbone))
    with pytest.raises(DraftError, match=f"lacks 1 tensors: {FC}"):
        inspect_checkpoint_head(save(tmp_path / "partial", _edit(**{FC: None}) | backbone))
    off = config("qwen3_next", num_nextn_predict_layers=0)
    with pytest.raises(DraftError, match="num_nextn_predict_layers = 0: the model has no MTP head"):
        inspect_checkpoint_head(save(tmp_path / "off", config_json=off))


def test_inspect_checkpoint_head_checks_a_quantised_head_by_name(tmp_path):
    packed = _edit(**{FC: None, "mtp.fc.weight_packed": torch.zeros(64, 16, dtype=torch.int32)})
    assert inspect_checkpoint_head(save(tmp_path / "a", packed)).quantised
    with pytest.raises(DraftError, match="lacks 1 tensors: mtp.norm.weight"):
        inspect_checkpoint_head(save(tmp_path / "b", {n: t for n, t in packed.items() if n != "mtp.norm.weight"}))


def test_a_draft_of_another_base_model_gets_a_warning(tmp_path):
    target = save(tmp_path / "target", {"model.embed_tokens.weight": torch.rand(96, 64)})
    other = save(tmp_path / "other", {"model.embed_tokens.weight": torch.rand(96, 64)})
    write_draft(tmp_path / "draft", head(TARGET), TARGET, {"base_fingerprint": fingerprint(target)})
    assert not read_draft(tmp_path / "draft", TARGET, target).warnings
    (warning,) = read_draft(tmp_path / "draft", TARGET, other).warnings
    assert f"trained for a base model with fingerprint {fingerprint(target)[:12]}" in warning
    assert not read_draft(tmp_path / "draft", TARGET, "org/not-downloaded").warnings


def test_target_without_readable_weights_is_a_warning(tmp_path):
    """vLLM may hold its weights in another format, or be sent them."""
    (tmp_path / "target").mkdir()
    write_draft(tmp_path / "draft", head(TARGET), TARGET, {"base_fingerprint": "0" * 64})
    (warning,) = read_draft(tmp_path / "draft", TARGET, tmp_path / "target").warnings
    assert warning.startswith("could not tell whether the draft was trained for these weights: ")
    assert "safetensors" in warning


def test_differing_numerics_and_a_quantised_target_get_warnings(tmp_path):
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    target = config("qwen3_next", rope_parameters={"rope_theta": 1e4}) | quantised
    made = save(tmp_path / "d", config_json=config("qwen3_next", rope_theta=1e6))
    warnings = "\n".join(read_draft(made, target).warnings)
    assert "rope_theta is 1000000.0 in the draft's config.json, and 10000.0 in the target's, which is used" in warnings
    assert "the target is quantised (fp8)" in warnings


def test_differing_numerics_of_a_deepseek_head_are_its_own(tmp_path):
    """vLLM builds its layers after the draft's config."""
    ours, target = (config("deepseek_v3", rope_theta=theta) for theta in (1e6, 1e4))
    (warning,) = read_draft(save(tmp_path / "d", head(ours), ours), target).warnings
    assert warning == "rope_theta is 10000.0 in the target's, and 1000000.0 in the draft's config.json, which is used"


_ATTENTION, _EXPERTS = "mtp.layers.0.self_attn.o_proj", "mtp.layers.0.mlp.experts.0.down_proj"
_EVERY_LINEAR = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}}}


@pytest.mark.parametrize(
    ("quantisation", "quantised"),
    [
        ({"quant_method": "fp8"}, _ATTENTION),
        ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]}, _ATTENTION),
        ({"quant_method": "fp8", "modules_to_not_convert": ["mtp.layers.0.self_attn"]}, _EXPERTS),
        ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "mtp"]}, None),
        ({"quant_method": "fp8", "ignored_layers": ["mtp.layers.0.self_attn", "mtp.layers.0.mlp"]}, None),
        (_EVERY_LINEAR | {"ignore": ["lm_head", "re:.*mlp.gate$"]}, _ATTENTION),
        (_EVERY_LINEAR | {"ignore": ["re:^mtp.*"]}, None),
        (_EVERY_LINEAR | {"config_groups": {"group_0": {"targets": ["re:model.*"]}}}, None),
        ({"quant_method": "gptq", "bits": 4}, None),  # not known: vLLM's loader will tell
        (None, None),
    ],
)
def test_refuse_quantised_head(tmp_path, quantisation, quantised):
    target = TARGET | {"quantization_config": quantisation}
    draft = read_draft(save(tmp_path / "d"), target)
    if quantised is None:
        refuse_quantised_head(draft, target)
        return
    with pytest.raises(DraftError, match=f"its head included .{quantised}.*exceptions of its quantization_config"):
        refuse_quantised_head(draft, target)


def test_resolve_draft(tmp_path, monkeypatch):
    directory = save(tmp_path / "d")
    assert resolve_draft(directory) == directory
    asked: dict[str, object] = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_draft("org/head", "v1", "/disk") == directory
    patterns = ["*.json", "*.safetensors"]
    assert asked == {"name": "org/head", "revision": "v1", "cache_dir": "/disk", "allow_patterns": patterns}
    shutil.copytree(directory, tmp_path / "dspark")
    with pytest.raises(DraftError, match="'dspark'"):
        resolve_draft(tmp_path / "dspark")


def test_resolve_draft_says_why_neither_works(monkeypatch):
    def offline(*_, **__):
        raise OSError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(DraftError, match=r"org/x: neither an existing directory nor a Hub .*\(offline mode"):
        resolve_draft("org/x")
