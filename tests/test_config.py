"""Options: what is accepted, what is refused, and that every refusal names the key and the remedy."""

import json

import pytest

from vllm_bebop.config import BebopConfig, BebopConfigError, forget_wishes, translate, unheeded

ASKED = {"method": "bebop", "num_speculative_tokens": 3}
SWITCHED_ON = {"VLLM_BEBOP": "1"}


def test_translate_leaves_other_methods_alone():
    for config in (None, {}, {"method": "ngram"}, {"method": "mtp", "num_speculative_tokens": 3}):
        assert translate(config, {}) is None
    for method in ("eagle3", "mtp_of_ours", None):
        assert translate({"method": method, "model": "d", "num_speculative_tokens": 3}, SWITCHED_ON) is None


def test_translate_reads_as_mtp_afterwards():
    translation = translate(ASKED | {"model": "drafts/a", "revision": "main", "max-model-len": 64}, {})
    assert translation.speculative_config == {
        "method": "mtp",
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
        "rejection_sample_method": "standard",
        "max_model_len": 64,
    }
    assert (translation.draft, translation.revision) == ("drafts/a", "main")
    assert translation.config == BebopConfig(acceptance="rejection")


@pytest.mark.parametrize(("key", "value"), [("kv_cache_dtype", "fp8"), ("disable_eagle_block_drop", True)])
def test_translate_hands_on_what_keeps_its_meaning(key, value):
    assert translate(ASKED | {key: value}, {}).speculative_config[key] == value


def test_translate_ignores_what_is_not_set():
    """As frameworks do that write down every field of vLLM's config."""
    unset = dict.fromkeys(["prompt_lookup_max", "num_speculative_tokens_per_batch_size", "kv-cache-dtype", "model"])
    assert translate(ASKED | unset, {}) == translate(ASKED, {})
    with pytest.raises(BebopConfigError, match="'num_speculative_tokens' is missing"):
        translate(ASKED | {"num_speculative_tokens": None}, {})


def test_translate_target_only_drafts_greedily():
    translation = translate(ASKED | {"acceptance": "target_only"}, {})
    assert translation.speculative_config["draft_sample_method"] == "greedy"


def test_translate_block_samples_drafts_and_may_limit_their_cache():
    translation = translate(ASKED | {"acceptance": "block", "draft_cache_gib": 2}, {})
    assert translation.speculative_config["draft_sample_method"] == "probabilistic"
    assert translation.config == BebopConfig(acceptance="block", draft_cache_gib=2.0)


OPTIONS_SET = {
    "VLLM_BEBOP_NUM_SPECULATIVE_TOKENS": "3",
    "VLLM_BEBOP_MODEL": "d",
    "VLLM_BEBOP_ACCEPTANCE": "target_only",
}


@pytest.mark.parametrize(("method", "switch"), [("mtp", SWITCHED_ON), ("bebop", {})])
def test_translate_accepts_the_same_options_from_the_environment(method, switch):
    by_config = translate(ASKED | {"model": "d", "acceptance": "target_only"}, {})
    assert translate({"method": method}, switch | OPTIONS_SET) == by_config


def test_wishes_are_forgotten_where_a_command_says_what_it_runs():
    kept = {"VLLM_BEBOP_MEND_CPU": "1", "HOME": "/"}
    environ = SWITCHED_ON | OPTIONS_SET | kept
    forget_wishes(environ)
    assert environ == kept


def test_variables_that_change_nothing_are_told():
    assert translate({"method": "mtp"}, OPTIONS_SET) is None
    assert unheeded("mtp", OPTIONS_SET) == (
        "VLLM_BEBOP_ACCEPTANCE, VLLM_BEBOP_MODEL, VLLM_BEBOP_NUM_SPECULATIVE_TOKENS: no effect without VLLM_BEBOP=1; "
        "method 'mtp' stays vLLM's own"
    )
    assert unheeded("mtp", {"VLLM_BEBOP_MEND_CPU": "1", "VLLM_BEBOP_CANDIDATE": "0.99"}) is None
    assert unheeded("ngram", SWITCHED_ON).startswith("VLLM_BEBOP=1 has no effect on method 'ngram'")


@pytest.mark.parametrize("alias", ["deepseek_mtp", "qwen3_next_mtp", "mimo_mtp"])
def test_translate_takes_over_every_name_of_mtp(alias):
    asked = {"method": alias, "num_speculative_tokens": 3}
    assert translate(asked, SWITCHED_ON) == translate(ASKED, {})
    assert translate(asked, {}) is None


def test_config_survives_json():
    config = BebopConfig(acceptance="target_only")
    assert BebopConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "environ", "message"),
    [
        ({"num_speculative_tokens": 0}, {}, "'num_speculative_tokens': 0 must be a whole number from 1 to 16"),
        ({"num_speculative_tokens": 17}, {}, "'num_speculative_tokens': 17 must be"),
        ({"num_speculative_tokens": "3"}, {}, "'num_speculative_tokens': '3' must be"),
        ({"num_speculative_tokens": True}, {}, "'num_speculative_tokens': True must be"),
        ({"num_speculative_tokens": 2.0}, {}, "'num_speculative_tokens': 2.0 must be"),
        ({"acceptance": "lossy"}, {}, "'acceptance': 'lossy' is unknown; accepted: rejection, block, target_only"),
        ({"accpetance": "rejection"}, {}, "unknown key 'accpetance'.*bebop accepts acceptance"),
        ({"prompt_lookup_max": 4}, {}, "unknown key 'prompt_lookup_max'"),
        ({"model": 7}, {}, "'model': 7 must be a non-empty string"),
        ({"model": ""}, {}, "'model': '' must be a non-empty string"),
        ({"revision": 1}, {}, "'revision': 1 must be"),
        ({"draft_cache_gib": float("inf")}, {}, "'draft_cache_gib': inf must be a finite number above 0"),
        ({"draft_cache_gib": float("nan")}, {}, "'draft_cache_gib': nan must be"),
        ({"rejection_sample_method": "synthetic"}, {}, "'synthetic' is not lossless"),
        ({"rejection_sample_method": "fly"}, {}, "'fly' is not lossless"),
        ({"rejection_sample_method": "block"}, {}, '\'block\' is not accepted.*say "acceptance": "block"'),
        ({"rejection_sample_method": "other"}, {}, "'other' is not accepted.*drop the key"),
        ({"acceptance": "block", "draft_sample_method": "greedy"}, {}, "contradicts 'acceptance': 'block'"),
        ({"synthetic_acceptance_length": 2.0}, {}, "'synthetic_acceptance_length' is not lossless"),
        ({"draft_sample_method": "greedy"}, {}, "'draft_sample_method': 'greedy' contradicts"),
        ({"method": "mtp"}, {"VLLM_BEBOP": "maybe"}, "VLLM_BEBOP='maybe': set it to 1"),
        ({"method": "mtp"}, SWITCHED_ON | {"VLLM_BEBOP_GAMMA": "3"}, "unknown variable VLLM_BEBOP_GAMMA; accepted"),
        (
            {"method": "mtp"},
            SWITCHED_ON | {"VLLM_BEBOP_NUM_SPECULATIVE_TOKENS": "three"},
            "VLLM_BEBOP_NUM_SPECULATIVE_TOKENS='three' must be a whole number",
        ),
        (
            {"method": "mtp", "model": "a"},
            SWITCHED_ON | {"VLLM_BEBOP_MODEL": "b"},
            "VLLM_BEBOP_MODEL='b' contradicts 'model': 'a'",
        ),
    ],
)
def test_translate_refuses(change, environ, message):
    with pytest.raises(BebopConfigError, match=message):
        translate(ASKED | change, environ)


def test_translate_refuses_a_missing_count():
    with pytest.raises(BebopConfigError, match="'num_speculative_tokens' is missing"):
        translate({"method": "bebop"}, {})
