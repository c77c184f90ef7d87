"""The picture of what bench_moe.py measured."""

from pathlib import Path
from typing import Any

from benchmarking.moe import spread


def plot(results: dict[str, Any], path: Path) -> None:
    """Time over tokens, one panel per routing, with the floor; saved to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routings = list(dict.fromkeys(row["routing"] for row in results["points"]))
    figure, axes = pyplot.subplots(1, len(routings), figsize=(6.5 * len(routings), 5), sharey=True, squeeze=False)
    for axis, routing in zip(axes[0], routings, strict=True):
        rows = [row for row in results["points"] if row["routing"] == routing]
        tokens = [row["tokens"] for row in rows]
        for name, style in (("grouped_mm", "s-"), ("fused_moe", "o-")):
            line = [spread(row["graph"][name]) for row in rows]
            label = f"{'torch ' if name == 'grouped_mm' else ''}{name}, CUDA graph"
            axis.plot(tokens, [point["median"] for point in line], style, label=label)
            axis.fill_between(tokens, [point["p20"] for point in line], [point["p80"] for point in line], alpha=0.2)
        if all("eager" in row for row in rows):
            eager = [spread(row["eager"]["owned"]["total"])["median"] for row in rows]
            axis.plot(tokens, eager, "^:", label="fused_moe, launched eagerly")
        axis.plot(tokens, [row["floor_us"] for row in rows], "k--", label="floor (measured bandwidth and rate)")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{routing} routing")
        axis.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("microseconds per layer")
    axes[0][0].legend()
    card = results["card"].get("name", "unknown card")
    figure.suptitle(f"One MoE layer, E,K,H,I = {results['shape']}, {results['dtype']}, {card}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
