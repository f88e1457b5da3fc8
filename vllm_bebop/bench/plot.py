"""Acceptance length against temperature: a panel per domain, a line per method, open markers for the expectation."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = {
    "stock_greedy": "#8c8c8c",
    "stock_probabilistic": "#e08214",
    "bebop_target_only": "#5aae61",
    "bebop_rejection": "#2166ac",
    "bebop_block": "#762a83",
}
_LABELS = {
    "stock_greedy": "vLLM, greedy draft (its default)",
    "stock_probabilistic": "vLLM, probabilistic draft",
    "bebop_target_only": "bebop, target-only",
    "bebop_rejection": "bebop, rejection sampling (its default)",
    "bebop_block": "bebop, block verification",
}
_SHIFT = 0.012  # of the temperature range between methods, so that equal results stay visible


def plot_acceptance(results: Mapping[str, Any], path: Path) -> None:
    """Draw the results of `acceptance.run` into a PNG; one row of panels per number of draft tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    conditions = results["conditions"]
    domains = list(conditions["domains"])
    gammas = sorted({engine["num_speculative_tokens"] for engine in results["engines"]})
    width = max(7.0, 3.2 * len(domains))  # inches, as everything in figsize
    figure, axes = plt.subplots(
        len(gammas),
        len(domains),
        figsize=(width, 3.1 * len(gammas) + 1.5),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, gamma in zip(axes, gammas, strict=True):
        engines = [engine for engine in results["engines"] if engine["num_speculative_tokens"] == gamma]
        engines.sort(key=lambda engine: list(_COLOURS).index(engine["method"]))
        for axis, domain in zip(row, domains, strict=True):
            for index, engine in enumerate(engines):
                cells = [cell for cell in engine["cells"] if cell["domain"] == domain]
                _draw(axis, engine["method"], cells, index - (len(engines) - 1) / 2)
            axis.set_title(f"{domain}, {gamma} draft tokens" if len(gammas) > 1 else domain, fontsize=11)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("acceptance length\n(accepted drafts + 1)")
    for axis in axes[-1]:
        axis.set_xlabel("temperature")
        axis.set_xticks(conditions["temperatures"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if conditions["expectation"]:
        handles.append(
            plt.Line2D([], [], linestyle="", marker="o", markerfacecolor="none", color="black", markersize=7)
        )
        labels.append("exact expectation, same rounds")
    figure.legend(handles, labels, loc="outside upper center", ncols=int(width / 3.3), frameon=False, fontsize=9)
    commits = ", ".join(dict.fromkeys(str(engine["commit"]) for engine in results["engines"]))
    figure.supxlabel(textwrap.fill(_caption(conditions, gammas, commits), int(15 * width)), fontsize=8, color="#444444")
    temporary = path.with_name(path.name + ".new")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def _draw(axis: Any, method: str, cells: list[dict[str, Any]], offset: float) -> None:
    temperatures = [cell["temperature"] for cell in cells]
    shift = offset * _SHIFT * (max(temperatures) - min(temperatures) or 1)
    x = [temperature + shift for temperature in temperatures]
    lengths = [cell["acceptance_length"] for cell in cells]
    means = [length["mean"] for length in lengths]
    errors = None
    if all(length["interval_95"] for length in lengths):
        intervals = [length["interval_95"] for length in lengths]
        errors = [
            [mean - low for mean, (low, _) in zip(means, intervals, strict=True)],
            [high - mean for mean, (_, high) in zip(means, intervals, strict=True)],
        ]
    line = "--" if method.startswith("stock") else "-"
    style = {
        "color": _COLOURS[method],
        "linestyle": line,
        "linewidth": 1.6,
        "marker": ".",
        "markersize": 5,
        "elinewidth": 1,
    }
    axis.errorbar(x, means, errors, label=_LABELS[method], **style)
    expected = [cell["expected"]["acceptance_length"] for cell in cells if "expected" in cell]
    if expected:
        marker = {"marker": "o", "markersize": 7, "markerfacecolor": "none"}
        axis.plot(x, expected, linestyle="", color=_COLOURS[method], **marker)


def _caption(conditions: Mapping[str, Any], gammas: list[int], commits: str) -> str:
    versions = conditions["versions"]
    drafts = f"{gammas[0]} draft tokens, " if len(gammas) == 1 else ""
    filters = "".join(f"{name} {conditions[name]}, " for name in ("top_k", "top_p") if conditions.get(name) is not None)
    requests = "/".join(str(count) for count in dict.fromkeys(conditions["domains"].values()))
    return (
        f"{conditions['model']}, draft: {conditions['draft']}; {drafts}{filters}{requests} requests per point, "
        f"{conditions['max_tokens']} tokens each; bars: 95 % bootstrap over requests; "
        f"vLLM {versions['vllm']}, {conditions['device']}, commit {commits}"
    )
