"""Train the draft that the demo serves: `bebop rollout` on prompts of the training texts, then `bebop train`.

    python tiny_model/train_draft.py

The checkpoint's own head has learnt one step only. So KL first makes a head that follows the model over all steps, and
end-to-end TV then trains it for what counts, on what the model itself writes. An interrupted run goes on where it
stopped; the rollouts and checkpoints lie in .venv/tiny_draft.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import corpus

from vllm_bebop import generate
from vllm_bebop.train.loop import Settings
from vllm_bebop.train.run import train_draft

HERE = Path(__file__).parent
CHECKPOINT, DRAFT = HERE / "checkpoint", HERE / "draft"
SCRATCH = HERE.parent / ".venv" / "tiny_draft"

PROMPTS_PER_DOMAIN = 128
PROMPT_TOKENS, NEW_TOKENS = 48, 464
FIRST = Settings(loss="kl", num_steps=5, learning_rate=1e-3, batch_rows=4, context=512, epochs=3)
SECOND = replace(FIRST, loss="e2e_tv", learning_rate=3e-4, epochs=1)


def make_rollouts() -> Path:
    """What the tiny model writes after prompts from its training texts, by domain in equal parts."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    prompts, rollouts = SCRATCH / "prompts.jsonl", SCRATCH / "rollouts.jsonl"
    texts = corpus.load(seed=0).train
    with open(prompts, "w") as file:
        for domain in corpus.DOMAINS:
            for number, text in enumerate(corpus.beginnings(texts[domain], PROMPTS_PER_DOMAIN)):
                file.write(json.dumps({"id": f"{domain} {number}", "text": text}) + "\n")
    sampling = generate.Sampling(max_tokens=NEW_TOKENS)
    generate.run(str(CHECKPOINT), [prompts], rollouts, sampling, num_speculative_tokens=3, prompt_tokens=PROMPT_TOKENS)
    return rollouts


def main() -> None:
    rollouts = make_rollouts()
    first, draft = SCRATCH / "first", SCRATCH / "draft"
    kept = SCRATCH / "hidden_states"
    if not first.exists():
        train_draft(CHECKPOINT, [rollouts], first, FIRST, hidden_states=kept)
    train_draft(CHECKPOINT, [rollouts], draft, SECOND, start=first, hidden_states=kept)
    shutil.rmtree(DRAFT, ignore_errors=True)
    shutil.copytree(draft, DRAFT)


if __name__ == "__main__":
    main()
