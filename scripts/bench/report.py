"""The serving bench in the README: a table between two marks, and a plot beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README, PLOT = ROOT / "README.md", ROOT / "scripts/bench/serve.svg"
BEGIN, END = "<!-- scripts/bench/serve --readme -->\n", "<!-- end -->\n"
SHOWN = {  # of the contenders, what the README calls them
    "torch": "`Torch()`",
    "torch-int8": '`Torch(weights="int8")`',
    "openvino": "`OpenVino()`",
    "openvino-int8": '`OpenVino(weights="int8")`',
    "ipex": "`Ipex()`",
    "vllm": "`Vllm(compiled=True)`, on CPUs",
    "vllm-server": "vLLM's own server, on CPUs",
    "transformers-serve": "transformers serve",
}
YARDSTICK = "vllm-server"


def write(medians: Mapping[str, Any]) -> None:
    """Table and plot of those contenders of SHOWN that have been measured; vLLM's server is one of them."""
    speeds = {
        title: {load: figures["tokens_per_s"] for load, figures in medians[name]["loads"].items() if load != "mixed"}
        for name, title in SHOWN.items()
        if name in medians
    }
    plot(speeds)
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{README} has no {BEGIN}{END}"
    README.write_text(before + begin + table(speeds) + end + after)


def table(speeds: Mapping[str, Mapping[str, float]]) -> str:
    """In tokens/s, and in parentheses as a share of what the yardstick reaches."""
    unit = speeds[SHOWN[YARDSTICK]]
    rows = [f"| tokens/s with so many clients | {' | '.join(unit)} |", f"|---|{'---|' * len(unit)}"]
    for title, own in speeds.items():
        cells = [f"{own[load]:.0f} ({own[load] / unit[load]:.2f})" for load in unit]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plot(speeds: Mapping[str, Mapping[str, float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "manta", "svg.fonttype": "none"}  # the same figures, the same short file
    from matplotlib import pyplot

    loads = list(speeds[SHOWN[YARDSTICK]])
    figure, axes = pyplot.subplots(1, len(loads), figsize=(9, 2.6), sharey=True, squeeze=False)
    names = [title.strip("`").replace("`", "") for title in speeds]
    for load, axis in zip(loads, axes[0], strict=True):
        ours = [title.startswith("`") for title in speeds]
        bars = axis.barh(
            names, [own[load] for own in speeds.values()], color=["#2a6f97" if one else "#b0b7bd" for one in ours]
        )
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set_title(f"{load} client{'s' * (load != '1')}", fontsize=9)
        axis.set_xticks([])
        axis.margins(x=0.2)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(labelsize=8, length=0)
    axes[0, 0].invert_yaxis()
    figure.suptitle("tokens/s over HTTP, 124.7 M model, bf16, two cores", fontsize=9)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
