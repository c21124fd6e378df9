"""The lines of `linear_speed.py` or `gpu_speed.py` as a picture: how many times as fast as bfloat16, by rows of x."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def keep(lines: Sequence[dict[str, Any]], title: str, base: str, options: argparse.Namespace) -> None:
    """Write them to `options.json` and draw them to `options.plot`, where these are given."""
    if options.json:
        options.json.write_text(json.dumps({"versions": title, "lines": lines}, indent=1))
    if options.plot:
        plot(lines, title, base, options.plot)


def plot(lines: Sequence[dict[str, Any]], title: str, base: str, path: Path) -> None:
    """Draw it, one panel for each kind of methods; ours in full lines, rivals dashed. `base` is one of them: 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    figure, panels = plt.subplots(1, len(kinds), figsize=(7.5 * len(kinds), 6), squeeze=False, layout="constrained")
    for panel, kind in zip(panels[0], kinds, strict=True):
        own = [line for line in lines if line["kind"] == kind and line["method"] != base]
        rows = sorted({line["rows"] for line in own})
        panel.axhline(1, color="black", linewidth=1)
        names = dict.fromkeys((line["method"], line["rival"]) for line in own)
        for i, (name, rival) in enumerate(names):
            ratios = {line["rows"]: line["ratios"][base] for line in own if line["method"] == name}
            style = {"linestyle": "--", "linewidth": 1.2} if rival else {"linewidth": 2.2}
            panel.plot(
                list(ratios), list(ratios.values()), marker="o", markersize=4, color=f"C{i}", label=name, **style
            )
        panel.set(xscale="log", yscale="log", xlabel="rows of x", title=kind, xticks=rows)
        panel.set_ylabel(f"times as fast as {base}")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.minorticks_off()
        low, high = panel.get_ylim()
        panel.set_yticks([t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, ncols=2)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
