"""Plots kernels_DEVICE.json: time by batch size against the peers, and how much of the copy bandwidth is reached."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from kernel_implementations import OURS, OURS_IN_VLLM

DRAFTS, VOCAB_SIZE = 3, 151_936


def plot(results: Path) -> Path:
    """Writes the image beside the results and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(results.read_text())
    entries = sorted(content["entries"], key=lambda entry: entry["batch"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    drafts, vocab_size = DRAFTS, VOCAB_SIZE
    if not any(_is_at(entry, drafts, vocab_size) for entry in entries):  # a dry run has other sizes
        drafts, vocab_size = entries[0]["num_drafts"], entries[0]["vocab_size"]
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in entries:
        if _is_at(entry, drafts, vocab_size):
            for name, result in entry["results"].items():
                lines[name].append((entry["batch"], result["total_us"]))
    for name, line in lines.items():
        ours = name in (OURS, OURS_IN_VLLM)
        left.plot(*zip(*line, strict=True), marker="o", label=name, linewidth=2.5 if ours else 1.2)
    left.set(xscale="log", yscale="log", xlabel="requests", ylabel="drafting + verification, microseconds")
    left.set_title(f"{drafts} drafts, vocabulary {vocab_size:,}")

    shares: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in entries:
        if entry["num_drafts"] == drafts:
            for name, part in ((OURS, "draft"), (OURS_IN_VLLM, "verify")):
                label = f"{part}, vocabulary {entry['vocab_size']:,}"
                shares[label].append((entry["batch"], 100 * entry["results"][name][part]["share_of_copy"]))
    for label, line in sorted(shares.items()):
        right.plot(*zip(*line, strict=True), marker="o", label=label)
    right.axhline(80, color="grey", linestyle=":", linewidth=1)
    right.set(xscale="log", xlabel="requests", ylabel="% of copy bandwidth, each logit read once")
    right.set_title(f"bebop, {drafts} drafts")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(content["conditions"]["device"])

    image = results.with_suffix(".png")
    temporary = image.with_name(image.name + ".new")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, image)
    return image


def _is_at(entry: dict[str, Any], num_drafts: int, vocab_size: int) -> bool:
    return entry["num_drafts"] == num_drafts and entry["vocab_size"] == vocab_size
