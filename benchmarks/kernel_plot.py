"""Plots kernels_DEVICE.json by vocabulary: time by batch size against the peers, and the share of copy bandwidth."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from kernel_implementations import OURS, OURS_IN_VLLM

DRAFTS = 3
SHARES = ((OURS, "draft"), (OURS_IN_VLLM, "draft"), (OURS_IN_VLLM, "verify"))


def plot(results: Path) -> Path:
    """Writes the image beside the results and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(results.read_text())
    entries = sorted((entry for entry in content["entries"] if entry["results"]), key=lambda entry: entry["batch"])
    counts = {entry["num_drafts"] for entry in entries}
    drafts = DRAFTS if DRAFTS in counts else max(counts)  # a dry run has other sizes
    entries = [entry for entry in entries if entry["num_drafts"] == drafts]
    vocab_sizes = sorted({entry["vocab_size"] for entry in entries})

    size = 1 + 4.5 * len(vocab_sizes), 8.2
    figure, rows = plt.subplots(2, len(vocab_sizes), figsize=size, layout="constrained", squeeze=False, sharey="row")
    for vocab_size, above, below in zip(vocab_sizes, *rows, strict=True):
        of_vocabulary = [entry for entry in entries if entry["vocab_size"] == vocab_size]
        for name, line in totals(of_vocabulary).items():
            is_ours = name in (OURS, OURS_IN_VLLM)
            above.plot(*zip(*line, strict=True), marker="o", label=name, linewidth=2.5 if is_ours else 1.2)
        above.set(yscale="log", title=f"vocabulary {vocab_size:,}", ylabel="drafting + verification, microseconds")
        for label, line in shares(of_vocabulary).items():
            below.plot(*zip(*line, strict=True), marker="o", label=label)
        below.axhline(80, color="grey", linestyle=":", linewidth=1)
        below.set(xlabel="requests", ylabel="% of copy bandwidth, reads and writes")
        for axes in (above, below):
            axes.set(xscale="log")
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(fontsize=8)
    figure.suptitle(f"{content['conditions']['device']}, {drafts} drafts")

    image = results.with_suffix(".png")
    temporary = image.with_name(image.name + ".new")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, image)
    return image


def totals(entries: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(requests, microseconds) of each implementation."""
    lines = defaultdict(list)
    for entry in entries:
        for name, result in entry["results"].items():
            lines[name].append((entry["batch"], result["total_us"]))
    return lines


def shares(entries: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(requests, percent of copy bandwidth) of each of SHARES."""
    lines = defaultdict(list)
    for entry in entries:
        for name, part in SHARES:
            if name in entry["results"]:
                lines[f"{name}, {part}"].append((entry["batch"], 100 * entry["results"][name][part]["share_of_copy"]))
    return lines
