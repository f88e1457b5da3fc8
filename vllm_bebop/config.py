"""What a user may ask of bebop, and every reason to refuse it: options are parsed here and nowhere else.

Two ways to ask, with the same options:

* `--speculative-config '{"method": "bebop", "num_speculative_tokens": 3, "model": "DRAFT"}'`
* `{"method": "mtp", ...}` (or an alias, "deepseek_mtp") plus `VLLM_BEBOP=1`, for stacks that admit no other method.

Either way, `VLLM_BEBOP_<OPTION>` may stand for a key that is not there.

`translate` turns either into a config that vLLM understands (method "mtp") and a `BebopConfig` that travels to every
worker inside `VllmConfig.additional_config["bebop"]`. Pure functions, no vLLM import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_bebop.errors import UserError

ACCEPTANCE_RULES = ("rejection", "block", "target_only")
DRAFT_CACHES = ("full", "candidates")
MAX_SPECULATIVE_TOKENS = 16  # as far as the kernels are tested

_ENV_SWITCH = "VLLM_BEBOP"
_ENV_PREFIX = "VLLM_BEBOP_"
# Read elsewhere (plugin.py, engine/versions.py); not options of the speculation itself.
_ENV_NOT_OPTIONS = ("VLLM_BEBOP_MEND_CPU", "VLLM_BEBOP_CANDIDATE")
# Our keys, and the variables that stand in for them.
_ENV_OPTIONS = {
    "VLLM_BEBOP_ACCEPTANCE": "acceptance",
    "VLLM_BEBOP_DRAFT_CACHE": "draft_cache",
    "VLLM_BEBOP_DRAFT_CACHE_GIB": "draft_cache_gib",
    "VLLM_BEBOP_MODEL": "model",
    "VLLM_BEBOP_NUM_SPECULATIVE_TOKENS": "num_speculative_tokens",
}
_NUMERIC_OPTIONS = {"num_speculative_tokens": (int, "a whole number"), "draft_cache_gib": (float, "a number")}
_OWN_KEYS = ("method", "num_speculative_tokens", "model", "revision", "acceptance", "draft_cache", "draft_cache_gib")
# vLLM's own speculative keys that keep their meaning under bebop and are handed on untouched.
_PASSED_ON_KEYS = (
    "attention_backend",
    "code_revision",
    "disable_eagle_block_drop",
    "disable_padded_drafter_batch",
    "draft_tensor_parallel_size",
    "enforce_eager",
    "index_share_for_mtp_iteration",
    "kv_cache_dtype",
    "max_model_len",
    "moe_backend",
    "quantization",
)
_NOT_LOSSLESS = "is not lossless; bebop only offers modes whose output distribution is exactly the target's"


class BebopConfigError(UserError):
    """A request that bebop refuses. The message names the key and what is accepted."""


@dataclass(frozen=True)
class BebopConfig:
    """What the workers need to know.

    acceptance: "rejection" samples drafts from q and accepts each with min(1, p/q) (arXiv:2606.12370, Eq. 2); "block"
        samples them likewise and accepts them together, on average never fewer (arXiv:2403.10444); "target_only" drafts
        argmax q and accepts with p(draft) (Eq. 1).
    draft_cache: what model runner V2 keeps of q until it is verified: "full" rows of logits, or "candidates", of every
        2,048 logits the 8 largest, to which the draft is then restricted (see `kernels.candidates`).
    draft_cache_gib: most memory for the draft's logits under model runner V2, in GiB; None: enough for every request.
        Requests past it draft and accept as under "target_only".
    """

    acceptance: str = "rejection"
    draft_cache: str = "full"
    draft_cache_gib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: it enters vLLM's compile-cache hash and reaches every worker."""
        return asdict(self)

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> BebopConfig:
        """Read back, in a worker, what `translate` put into `additional_config`."""
        return cls(**vllm_config.additional_config["bebop"])


@dataclass(frozen=True)
class Translation:
    """A request for bebop, taken apart: `config` for our workers, `speculative_config` for vLLM.

    `draft` is the path or Hub id the user gave, None where the target's own head is to be used; `revision` its Hub
    revision.
    """

    config: BebopConfig
    speculative_config: dict[str, Any]
    draft: str | None
    revision: str | None


def translate(speculative_config: Mapping[str, Any] | None, environ: Mapping[str, str]) -> Translation | None:
    """Read a user's speculative config; None where bebop is not asked for.

    Args:
        speculative_config: as given to vLLM; keys may use '-' for '_', and are absent where they are None, vLLM's own
            default. Not modified.
        environ: usually `os.environ`.
    Raises:
        BebopConfigError: an option is unknown, contradictory, of the wrong type or out of range.
    """
    given = (speculative_config or {}).items()
    options = {key.replace("-", "_"): value for key, value in given if value is not None}
    method = options.get("method")
    if method != "bebop" and not (_is_mtp(method) and switched_on(environ)):
        return None
    options |= _options_from_env(environ, options)

    _refuse_lossy(options)
    _refuse_unknown(options)
    config = BebopConfig(
        acceptance=_choice(options, "acceptance", ACCEPTANCE_RULES),
        draft_cache=_choice(options, "draft_cache", DRAFT_CACHES),
        draft_cache_gib=_draft_cache_gib(options),
    )
    num_speculative_tokens = _num_speculative_tokens(options)
    draft = _text(options, "model")
    translated = {key: options[key] for key in _PASSED_ON_KEYS if key in options}
    translated |= {
        "method": "mtp",
        "num_speculative_tokens": num_speculative_tokens,
        # Under "probabilistic" vLLM keeps the draft's logits for verification; one-hot drafts need none.
        "draft_sample_method": "greedy" if config.acceptance == "target_only" else "probabilistic",
        "rejection_sample_method": "standard",
    }
    return Translation(config, translated, draft, _text(options, "revision"))


def switched_on(environ: Mapping[str, str]) -> bool:
    """Whether `VLLM_BEBOP` asks for method "mtp" to be taken over. Raises BebopConfigError: it is neither 1 nor 0."""
    value = environ.get(_ENV_SWITCH, "")
    if value.lower() in ("", "0", "false"):
        return False
    if value.lower() in ("1", "true"):
        return True
    raise BebopConfigError(f"{_ENV_SWITCH}={value!r}: set it to 1 (on) or 0 (off)")


def unheeded(method: Any, environ: Mapping[str, str]) -> str | None:
    """Which variables of ours change nothing about a method left to vLLM, and why; None if there are none."""
    if switched_on(environ):
        ours = '"mtp" and its "..._mtp" aliases'
        return f"{_ENV_SWITCH}=1 has no effect on method {method!r}: bebop takes over {ours} only"
    if options := sorted(_set_options(environ)):
        return f"{', '.join(options)}: no effect without {_ENV_SWITCH}=1; method {method!r} stays vLLM's own"
    return None


def forget_wishes(environ: MutableMapping[str, str]) -> None:
    """Take out what asks for bebop or an option of it, for a command that says itself what it runs."""
    for name in (_ENV_SWITCH, *_set_options(environ)):
        environ.pop(name, None)


def _set_options(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environ.items() if name.startswith(_ENV_PREFIX) and name not in _ENV_NOT_OPTIONS
    }


def _is_mtp(method: Any) -> bool:
    """vLLM's own method, or an alias of it: "deepseek_mtp", "qwen3_next_mtp", ..."""
    return isinstance(method, str) and (method == "mtp" or method.endswith("_mtp"))


def _options_from_env(environ: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in _set_options(environ).items():
        if name not in _ENV_OPTIONS:
            raise BebopConfigError(f"unknown variable {name}; accepted: {', '.join(sorted(_ENV_OPTIONS))}")
        key = _ENV_OPTIONS[name]
        parsed: Any = value
        if key in _NUMERIC_OPTIONS:
            number, description = _NUMERIC_OPTIONS[key]
            try:
                parsed = number(value)
            except ValueError:
                raise BebopConfigError(f"{name}={value!r} must be {description}") from None
        if key in options and options[key] != parsed:
            raise BebopConfigError(
                f"{name}={value!r} contradicts {key!r}: {options[key]!r} in the speculative config; give only one"
            )
        found[key] = parsed
    return found


def _refuse_lossy(options: Mapping[str, Any]) -> None:
    """Modes of vLLM that change the output distribution, or that bebop's own verification replaces."""
    sample_method = options.get("rejection_sample_method", "standard")
    if sample_method in ("synthetic", "fly"):
        raise BebopConfigError(f"'rejection_sample_method': {sample_method!r} {_NOT_LOSSLESS}")
    if sample_method != "standard":
        remedy = 'say "acceptance": "block"' if sample_method == "block" else 'drop the key (accepted: "standard")'
        raise BebopConfigError(
            f"'rejection_sample_method': {sample_method!r} is not accepted with bebop, which brings its own "
            f"verification; {remedy}"
        )
    for key in options:
        if key.startswith(("synthetic_", "fly_")):
            raise BebopConfigError(f"{key!r} {_NOT_LOSSLESS}; drop the key")
    drafting = options.get("draft_sample_method")
    if drafting is not None:
        expected = "greedy" if options.get("acceptance") == "target_only" else "probabilistic"
        if drafting != expected:
            raise BebopConfigError(
                f"'draft_sample_method': {drafting!r} contradicts 'acceptance': "
                f"{options.get('acceptance', 'rejection')!r}, which needs {expected!r}; drop the key"
            )


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    accepted = {*_OWN_KEYS, *_PASSED_ON_KEYS, "rejection_sample_method", "draft_sample_method"}
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise BebopConfigError(
            f"unknown key {', '.join(map(repr, unknown))} in the speculative config; bebop accepts "
            f"{', '.join(sorted(accepted))}"
        )


def _choice(options: Mapping[str, Any], key: str, accepted: tuple[str, ...]) -> str:
    """One of `accepted`; the first if the key is absent."""
    value = options.get(key, accepted[0])
    if value not in accepted:
        raise BebopConfigError(f"{key!r}: {value!r} is unknown; accepted: {', '.join(accepted)}")
    return value


def _draft_cache_gib(options: Mapping[str, Any]) -> float | None:
    for key in ("draft_cache", "draft_cache_gib"):
        if key in options and options.get("acceptance") == "target_only":
            raise BebopConfigError(f"{key!r} has no meaning with 'acceptance': 'target_only', which keeps no cache")
    value = options.get("draft_cache_gib")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BebopConfigError(f"'draft_cache_gib': {value!r} must be a finite number above 0")
    return float(value)


def _num_speculative_tokens(options: Mapping[str, Any]) -> int:
    accepted = f"a whole number from 1 to {MAX_SPECULATIVE_TOKENS} (3 is a good start)"
    if "num_speculative_tokens" not in options:
        raise BebopConfigError(f"'num_speculative_tokens' is missing; give {accepted}")
    value = options["num_speculative_tokens"]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SPECULATIVE_TOKENS:
        raise BebopConfigError(f"'num_speculative_tokens': {value!r} must be {accepted}")
    return value


def _text(options: Mapping[str, Any], key: str) -> str | None:
    value = options.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise BebopConfigError(f"{key!r}: {value!r} must be a non-empty string")
    return value
