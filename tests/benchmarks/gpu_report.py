"""What ``gpu.py`` measured, as Markdown and as a figure."""

from __future__ import annotations

from tests.benchmarks.report import table

# Fractions of the matrix rate, counted without what is computed twice, and times as fast as sentence-transformers.
GOALS = {"training": 0.4, "encoding": 0.6, "ratio": 2.0}
# How the reason begins why something is left out that no machine without a GPU can do.
NEEDS_CUDA = "needs CUDA"
# Kind of part → how the ways begin that are compared → what ours are compared with.
_THEIRS = {
    "training": {"": "sentence-transformers"},
    "encoding": {kind: f"{kind}, sentence-transformers unpadded" for kind in ("forward", "encode")},
}
_SPEED = {
    "rows": "rows",
    "tokens": "tokens",
    "size": "tokens of a chunk, or rows",
    "tokens_per_second": "tokens/s",
    "rows_per_second": "rows/s",
    "peak_gb": "GB",
    "useful_fraction": "fraction of the matrix rate",
    "performed_fraction": "with recomputation",
    "lowest_cosine": "lowest cosine",
}


def matrix_rate(results):
    """The largest bf16 rate of square products that was measured, in operations per second; None without any."""
    records = results["parts"].get("rate", {"records": []})["records"]
    rates = [
        each["operations_per_second"] for each in records if each.get("precision") == "bf16" and "left_out" not in each
    ]
    return max(filter(None, rates), default=None)


def failures(results):
    """What was not equal or could not be compared, and parts that did not come to their end."""
    found = []
    for name, part in results["parts"].items():
        found += [f"{name}: {part['ended']}"] if part["ended"] else []
        for each in part["records"]:
            why = "not equal" if each.get("equal") is False else each.get("left_out")
            counts = name == "equality" or each.get("way") == "whole part"
            if why and counts and not why.startswith(NEEDS_CUDA):
                found.append(": ".join(filter(None, (name, each["way"], each.get("precision"), why))))
    return found


def speeds(results, kind):
    """``(key, record)`` of what was measured in the parts of a kind; the key is shape, lengths and way."""
    for name, part in results["parts"].items():
        if name.split()[0] == kind:
            for each in part["records"]:
                if "useful_operations_per_second" in each:
                    yield (each["shape"], each.get("lengths", each.get("widths", "")), each["way"]), each


def comparisons(results):
    """Rows of a table: the best of ours of each shape and distribution beside the goals."""
    for kind, pairs in _THEIRS.items():
        cases = {}
        for (shape, lengths, way), each in speeds(results, kind):
            cases.setdefault((shape, lengths), {})[way] = each
        for (shape, lengths), ways in cases.items():
            for beginning, theirs in pairs.items():
                ours = [each for way, each in ways.items() if "ours" in way and way.startswith(beginning)]
                best = max((each["useful_fraction"] or 0.0 for each in ours), default=0.0)
                ratio = ""
                if ours and theirs in ways:
                    ratio = max(each["tokens_per_second"] for each in ours) / ways[theirs]["tokens_per_second"]
                part = f"{kind}, {beginning}" if beginning else kind
                yield [part, shape, lengths, best, GOALS[kind], ratio, GOALS["ratio"]]


def markdown(results):
    """Machine, goals, equality, and a table of each kind of part; what was left out comes last."""
    known = [each for part in results["parts"].values() for each in part["records"]]
    machine = next((each for each in known if "hardware" in each), {"hardware": {}, "versions": {}})
    hardware = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine["hardware"].items() if value)
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    parts = [
        "# First minutes on a GPU",
        f"Date: {results['date']}. {hardware}.\nVersions: {versions}.\nWeights are random. Tokens are real ones, "
        "padding does not count. Operations are those of training/planning/costs.py.",
        "**A tiny run: no figure here means anything.**" if results["tiny"] else "",
        "\n".join(f"- **{each}**" for each in failures(results)),
        "## Goals",
        table(
            ["part", "shape", "lengths", "best fraction", "goal", "against sentence-transformers", "goal"],
            list(comparisons(results)),
        ),
        "## Matrix rate",
        _records(results, "rate", ["precision", "size", "operations_per_second"]),
        "## Equality",
        "Relative errors against the stock way in fp32; three times those of the stock way in the same precision are "
        "allowed.",
        _records(results, "equality", ["way", "precision", "loss_error", "gradient_error", "equal"]),
    ]
    for kind in ("training", "encoding", "growth", "lora"):
        rows = [
            [*key, *(_cell(each.get(name, "")) for name in _SPEED), _range(each)] for key, each in speeds(results, kind)
        ]
        parts += [f"## {kind.capitalize() if kind != 'lora' else 'LoRA'}"]
        parts += [table(["shape", "lengths or widths", "way", *_SPEED.values(), "seconds (range)"], rows)]
    left_out = [
        f"- {name}: {', '.join(str(value) for value in each.values())}"
        for name, part in results["parts"].items()
        for each in part["records"]
        if "left_out" in each
    ]
    parts += ["## Left out", "\n".join(left_out) or "Nothing.", results.get("figure") or ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def _records(results, name, columns):
    records = results["parts"].get(name, {"records": []})["records"]
    return table(columns, [[_cell(each[key]) for key in columns] for each in records if columns[-1] in each])


def _cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-3 else value


def _range(each):
    seconds = each.get("seconds")
    return f"{seconds['median']:.3g} ({seconds['min']:.3g} – {seconds['max']:.3g})" if seconds else ""


def draw(results, path):
    """Draw the fractions of the matrix rate beside the goals; return a line that says where, or why not."""
    # Optional: no part needs it.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No figure: matplotlib is not installed."
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), ("training", "encoding"), strict=True):
        bars = [(", ".join(filter(None, key)), each["useful_fraction"] or 0.0) for key, each in speeds(results, kind)]
        axis.barh([name for name, _ in bars], [value for _, value in bars])
        axis.axvline(GOALS[kind], color="black", linestyle="--", label=f"goal {GOALS[kind]}")
        axis.invert_yaxis()
        axis.tick_params(labelsize=6)
        axis.set(title=kind, xlabel="fraction of the bf16 matrix rate")
        axis.legend()
    figure.savefig(path, dpi=150)
    return f"![Fractions of the matrix rate]({path.name})"
