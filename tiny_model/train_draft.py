"""Train the draft that the demo serves: `bebop rollout` on prompts of the training texts, then `bebop train`.

    python tiny_model/train_draft.py

The draft starts from the checkpoint's own head and learns end-to-end TV on what the model itself writes. An interrupted
run goes on where it stopped; the rollouts and checkpoints lie in .venv/tiny_draft.
"""

import json
import shutil
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
SETTINGS = Settings(loss="e2e_tv", num_steps=5, learning_rate=1e-3, batch_rows=4, context=512, epochs=3)


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
    draft = SCRATCH / "draft"
    train_draft(CHECKPOINT, [make_rollouts()], draft, SETTINGS)
    shutil.rmtree(DRAFT, ignore_errors=True)
    shutil.copytree(draft, DRAFT)


if __name__ == "__main__":
    main()
