"""What a request for bebop becomes before the engine is built, and what is refused then."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.support import tiny_heads
from tests.support.engines import BEBOP, TINY_MODEL
from vllm_bebop.config import BebopConfigError, translate
from vllm_bebop.draft import DraftError, draft_config, head_tensor_names, write_draft
from vllm_bebop.engine import intake

CONFIG = json.loads((TINY_MODEL / "config.json").read_text())


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    tensors = load_file(TINY_MODEL / "model.safetensors")
    head = {name: tensors[name] for name in head_tensor_names(TINY_MODEL, CONFIG)}
    return write_draft(tmp_path_factory.mktemp("drafts") / "draft", head, draft_config(CONFIG)).path


def _taken_in(speculative_config, config=CONFIG, pipeline_parallel_size=1, load_options=None, **model):
    """The engine's arguments once a request is taken in."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(str(TINY_MODEL), speculative_config=speculative_config, **(load_options or {}))
    described = {"model": str(TINY_MODEL), "revision": None, "code_revision": None, "model_weights": ""}
    described |= {"quantization": None} | model
    model_config = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config), **described)
    parallel_config = SimpleNamespace(worker_cls="auto", pipeline_parallel_size=pipeline_parallel_size)
    intake._apply(args, translate(speculative_config, {}), model_config, parallel_config)
    return args


def test_draft_directory_is_handed_on(draft):
    assert _taken_in(BEBOP | {"model": str(draft)}).speculative_config["model"] == str(draft)


def test_hub_draft_is_handed_on_by_its_name(draft, monkeypatch):
    """Other nodes download it themselves: this one's cache is not theirs."""
    monkeypatch.setattr("vllm_bebop.draft.resolve_draft", lambda name, revision, download_dir: draft)
    handed_on = _taken_in(BEBOP | {"model": "org/head", "revision": "v1"}).speculative_config
    assert (handed_on["model"], handed_on["revision"]) == ("org/head", "v1")


def test_hub_draft_is_looked_for_where_vllm_keeps_weights(draft, tmp_path):
    """A cache of the Hub's own form; the usual one, which may be on a small disk, has nothing of it."""
    repository = tmp_path / "models--org--head"
    shutil.copytree(draft, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    asked = BEBOP | {"model": "org/head"}
    with pytest.raises(DraftError, match="org/head: neither an existing directory nor a Hub repository"):
        _taken_in(asked)
    assert _taken_in(asked, load_options={"download_dir": str(tmp_path)}).speculative_config["model"] == "org/head"


@pytest.mark.parametrize("name", [str(TINY_MODEL), str(TINY_MODEL / ".." / TINY_MODEL.name)])
def test_target_as_its_own_draft_is_the_targets_head(name):
    """As stock vLLM allows for method "mtp"."""
    taken_in = _taken_in(BEBOP | {"model": name})
    assert taken_in.speculative_config == _taken_in(BEBOP).speculative_config
    assert "model" not in taken_in.speculative_config


@pytest.mark.parametrize("target", ["org/model", "/cache/models--org--model/snapshots/abc"])
def test_targets_hub_id_as_draft_is_the_targets_head(target):
    assert "model" not in _taken_in(BEBOP | {"model": "org/model"}, model=target).speculative_config


@pytest.mark.parametrize(
    "change", [{}, {"revision": "v2"}, {"model": "org/model"}, {"model": "org/model", "revision": "v2"}]
)
def test_own_head_is_of_the_targets_revision(change):
    """vLLM itself would read the head from the repository's default revision."""
    taken_in = _taken_in(BEBOP | change, model="org/model", revision="v2", code_revision="c2").speculative_config
    assert (taken_in["revision"], taken_in["code_revision"]) == ("v2", "c2")
    assert "model" not in taken_in
    asked = BEBOP | change | {"code_revision": "c1"}
    assert _taken_in(asked, model="org/model", revision="v2").speculative_config["code_revision"] == "c1"


def test_default_revision_has_a_name():
    for change in ({"revision": "main"}, {"model": "org/model", "revision": "main"}):
        assert "model" not in _taken_in(BEBOP | change, model="org/model").speculative_config


def test_another_revision_without_a_model_is_refused():
    with pytest.raises(BebopConfigError, match="'revision': 'v1' without 'model'.* revision is 'v2': name the draft"):
        _taken_in(BEBOP | {"revision": "v1"}, model="org/model", revision="v2")
    with pytest.raises(BebopConfigError, match="'revision': 'v1' without 'model'.* revision is 'main'"):
        _taken_in(BEBOP | {"revision": "v1"})


def test_another_revision_of_the_target_is_a_draft(monkeypatch):
    def not_found(name, revision, download_dir):
        raise DraftError(f"looked for {revision}")

    monkeypatch.setattr("vllm_bebop.draft.resolve_draft", not_found)
    with pytest.raises(DraftError, match="looked for v2"):
        _taken_in(BEBOP | {"model": "org/model", "revision": "v2"}, model="org/model")


def test_draft_is_loaded_with_the_targets_options():
    options = {"download_dir": "/somewhere", "safetensors_load_strategy": "eager", "load_format": "dummy"}
    load_config = _taken_in(BEBOP, load_options=options).speculative_config["draft_load_config"]
    assert load_config["download_dir"] == "/somewhere" and load_config["safetensors_load_strategy"] == "eager"
    assert load_config["load_format"] == "bebop"


def test_draft_is_refused_with_pipeline_parallelism(draft):
    with pytest.raises(BebopConfigError, match="'model': .* cannot be served with pipeline parallelism.*bebop merge"):
        _taken_in(BEBOP | {"model": str(draft)}, pipeline_parallel_size=2)
    _taken_in(BEBOP, pipeline_parallel_size=2)


def test_own_head_in_object_storage_is_refused(draft):
    with pytest.raises(BebopConfigError, match="object storage.*give the head as a draft"):
        _taken_in(BEBOP, model_weights="s3://bucket/model")
    _taken_in(BEBOP | {"model": str(draft)}, model_weights="s3://bucket/model")


def test_own_head_under_a_misread_path_is_refused():
    with pytest.raises(DraftError, match="'eagle3', from which vLLM concludes"):
        _taken_in(BEBOP, model="/models/eagle3/target")


def test_draft_of_a_quantised_target_is_refused(draft):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(DraftError, match="its head included .mtp.layers.0.self_attn.o_proj."):
        _taken_in(BEBOP | {"model": str(draft)}, CONFIG | {"quantization_config": fp8})
    modules = [name.removesuffix(".weight") for name in head_tensor_names(TINY_MODEL, CONFIG)]
    spared = CONFIG | {"quantization_config": fp8 | {"modules_to_not_convert": modules}}
    _taken_in(BEBOP | {"model": str(draft)}, spared)


@pytest.mark.parametrize("own_head", [True, False])
def test_head_that_bitsandbytes_would_pack_is_refused(draft, own_head):
    """Its loader cannot take one, and any other stops at an assertion; a head that is spared is served."""
    asked = BEBOP if own_head else BEBOP | {"model": str(draft)}
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}
    for config in (CONFIG, CONFIG | {"quantization_config": stored}):
        with pytest.raises(BebopConfigError, match="bitsandbytes quantises .*mtp.layers.0.self_attn.o_proj.*skip_mod"):
            _taken_in(asked, config, quantization="bitsandbytes")
    spared = CONFIG | {"quantization_config": stored | {"llm_int8_skip_modules": ["mtp", "lm_head"]}}
    _taken_in(asked, spared, quantization="bitsandbytes")


def test_switch_without_effect_warns(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_bebop.plugin import register

    register()
    monkeypatch.setenv("VLLM_BEBOP", "1")
    warnings = []
    monkeypatch.setattr(logging.getLogger("vllm.bebop"), "warning", lambda text, *a: warnings.append(text % a))
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    EngineArgs(str(TINY_MODEL), speculative_config=ngram).create_engine_config()
    assert warnings == [
        'bebop: VLLM_BEBOP=1 has no effect on method \'ngram\': bebop takes over "mtp" and its "..._mtp" aliases only'
    ]


def test_relative_draft_is_found_from_home(draft, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(draft).parent))
    assert _taken_in(BEBOP | {"model": "~/draft"}).speculative_config["model"] == str(draft)


def _engine_config(**arguments):
    """What `vllm serve` builds from these arguments."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_bebop.plugin import register

    register()
    return EngineArgs(str(TINY_MODEL), **arguments).create_engine_config()


@pytest.mark.parametrize(
    "arguments",
    [
        {"spec_method": "mtp", "spec_tokens": 2},
        {"spec_method": "mtp", "speculative_config": {"num_speculative_tokens": 2}},
        {"spec_tokens": 2, "speculative_config": {"method": "mtp"}},
        {"spec_tokens": 2, "speculative_config": {"method": "mtp", "num-speculative-tokens": 2}},
    ],
)
def test_shorthand_flags_stand_for_keys(arguments, monkeypatch):
    monkeypatch.setenv("VLLM_BEBOP", "1")
    config = _engine_config(**arguments)
    assert config.additional_config["bebop"] and config.speculative_config.num_speculative_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"spec_tokens": 2}, "--spec-tokens 2 contradicts 'num_speculative_tokens': 3"),
        ({"spec_method": "mtp"}, "--spec-method mtp contradicts 'method': 'bebop'"),
        ({"spec_model": "a"}, "--spec-model a contradicts 'model': 'b'"),
    ],
)
def test_flag_that_contradicts_its_key_is_refused(arguments, complaint):
    with pytest.raises(BebopConfigError, match=complaint):
        _engine_config(speculative_config=BEBOP | {"model": "b"}, **arguments)


def test_switch_is_not_read_without_speculation(monkeypatch):
    """The variable may be meant for other engines on the machine."""
    monkeypatch.setenv("VLLM_BEBOP", "yes")
    assert _engine_config().speculative_config is None
    with pytest.raises(BebopConfigError, match="VLLM_BEBOP='yes': set it to 1"):
        _engine_config(speculative_config={"method": "mtp", "num_speculative_tokens": 2})


def test_relative_draft_is_handed_on_as_an_absolute_path(draft, monkeypatch):
    """Workers may start elsewhere; and vLLM reads the method from the whole path."""
    monkeypatch.chdir(Path(draft).parent)
    assert _taken_in(BEBOP | {"model": "draft"}).speculative_config["model"] == str(draft)
    misread = Path(draft).parent / "eagle3"
    misread.mkdir()
    (misread / "draft").symlink_to(draft)
    monkeypatch.chdir(misread)
    with pytest.raises(DraftError, match="'eagle3', from which vLLM concludes"):
        _taken_in(BEBOP | {"model": "draft"})


LONGER = {"max_model_len": 2048, "hf_overrides": {"max_position_embeddings": 4096}}  # config.json says 1024


@pytest.mark.parametrize("own_head", [True, False])
def test_draft_serves_contexts_that_overrides_extend(draft, own_head):
    asked = BEBOP if own_head else BEBOP | {"model": str(draft)}
    assert (
        _engine_config(speculative_config=asked, **LONGER).speculative_config.draft_model_config.max_model_len == 2048
    )
    shorter = _engine_config(speculative_config=asked | {"max_model_len": 512}, **LONGER)
    assert shorter.speculative_config.draft_model_config.max_model_len == 512


def test_deepseek_draft_keeps_its_length_and_warns(monkeypatch):
    """Its layers, rotary table included, are built after the draft's config."""
    warnings = []
    monkeypatch.setattr(intake.logger, "warning", lambda text, *a: warnings.append(text % a))
    hf_config = SimpleNamespace(to_dict=lambda: tiny_heads.config("deepseek_v3"))
    draft = SimpleNamespace(max_model_len=1024, hf_config=hf_config)
    intake._extend_draft(draft, SimpleNamespace(max_model_len=1024))
    assert not warnings
    intake._extend_draft(draft, SimpleNamespace(max_model_len=2048))
    assert draft.max_model_len == 1024
    assert "ends at 1024 tokens, the target's at 2048: vLLM builds a DeepSeek-V3 head" in warnings[0]
