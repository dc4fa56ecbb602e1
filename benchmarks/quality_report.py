"""What benchmarks/quality.py found → figures by set, whether they hold, tables, a picture. Runs no model."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch

from builder.make_demo_models import PARTS, RECORD, sha256

EQUAL = 100.0  # dB, in place of infinity for equal frames
NEAR = 0.25  # of what was asked: a travel that is this near counts
FIRST_FRAME = 34.0  # dB
MOST_FAILURES = 20  # of a set, in the text; the JSON has all
NEUTRAL = {  # drift of a video that does not change
    "brightness": 0.0,
    "contrast": 1.0,
    "sharpness": 1.0,
    "chroma": 1.0,
}


class Bound(NamedTuple):
    set: str
    figure: str
    least: float
    what: str


BOUNDS = (
    Bound("vae", "world", 36, "VAE, world clips: PSNR, mean (dB)"),
    Bound("vae", "stills", 28, "VAE, photographs: PSNR, mean (dB)"),
    Bound("i2v", "followed", 0.97, "prompt followed"),
    Bound("i2v", "travel", 0.90, f"travel within {100 * NEAR:g} %"),
    Bound("i2v", "bystanders", 0.98, "bystanders stay"),
    Bound("i2v", "first_frame", FIRST_FRAME, "first frame: PSNR to the picture, median (dB)"),
    Bound("i2v", "gain", 6, "PSNR above a still's, median (dB)"),
    Bound("unseen", "followed", 0.95, "prompt followed"),
    Bound("f1", "followed", 0.90, "prompt followed"),
    Bound("i2v-4", "followed", 0.90, "prompt followed"),
    Bound("f1-4", "followed", 0.90, "prompt followed"),
    Bound("i2v-10", "kept", 0.80, "shapes kept"),
    Bound("f1-10", "kept", 0.80, "shapes kept"),
    Bound("camera", "followed", 0.80, "prompt followed"),
    Bound("camera-f1", "followed", 0.80, "prompt followed"),
)

# column → figure of a set; shares are printed in %, all else to a tenth
COLUMNS = {
    "n": "n",
    "followed": "followed",
    "kept": "kept",
    f"travel within {100 * NEAR:g} %": "travel",
    "bystanders stay": "bystanders",
    "first frame, dB": "first_frame",
    f"≥ {FIRST_FRAME:g} dB": "first_frame_holds",
    "least": "first_frame_least",
    "PSNR, dB": "psnr",
    "SSIM": "ssim",
    "above a still, dB": "gain",
    "mean": "gain_mean",
}
SHARES = {"followed", "kept", "travel", "bystanders", "first_frame_holds", "true_followed", "wrong_followed"}

Summary = dict[str, dict[str, float | None]]


def write_report(found: list[dict], models: Path, folder: Path, run: dict) -> None:
    """Write quality.json, .md and .png of what was found into the folder, and print the second."""
    by_set = {name: [one for one in found if one["set"] == name] for name in _in_order(found, "set")}
    summary = {name: summarised(samples) for name, samples in by_set.items()}
    costs = summarised_costs(by_set.get("costs", []))
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "weights": digest(models),
        **run,
    }
    text = report(about, by_set, summary, costs)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"about": about, "summary": summary, "costs": costs, "samples": found}
    (folder / "quality.json").write_text(json.dumps(everything, indent=1, ensure_ascii=False), "utf-8")
    (folder / "quality.md").write_text(text, "utf-8")
    print(text)
    draw(summary, costs, folder / "quality.png")


def digest(models: Path) -> str:
    """SHA-256 of the SHA256SUMS that the models' files would have in builder/demo/weights."""
    files = [path for part in PARTS for path in (models / part).rglob("*") if path.is_file()]
    files += [models / RECORD] if (models / RECORD).is_file() else []
    sums = "".join(f"{sha256(path)}  {path.relative_to(models).as_posix()}\n" for path in sorted(files))
    return hashlib.sha256(sums.encode()).hexdigest()


def summarised(samples: list[dict]) -> dict[str, float | None]:
    """One set's figures; None where there was nothing to measure."""
    if samples[0]["set"] == "costs":
        return {"n": len(samples)}
    if samples[0]["set"] == "control":
        shares = {name: _share(one[name] for one in samples) for name in ("true_followed", "wrong_followed")}
        return {"n": len(samples), **shares}
    if samples[0]["set"] == "vae":
        world = [one["clip"] for one in samples if "still" not in one]
        stills, clips = ([one[of] for one in samples if "still" in one] for of in ("still", "clip"))
        figures = {"n": len(samples)}
        for name, values in {"world": world, "stills": stills, "photograph_clips": clips}.items():
            figures |= {name: _of(mean, values), f"{name}_least": _of(min, values)}
        return figures
    travel = [event["travel"] for one in samples for event in one["events"] if event["travel"] is not None]
    first, gain = [one["first_frame"] for one in samples], [one["gain"] for one in samples]
    return {
        "n": len(samples),
        "followed": _share(one["followed"] for one in samples),
        "kept": _share(kept for one in samples for kept in one["kept"]),
        "travel": _share(abs(ratio - 1) <= NEAR for ratio in travel),
        "bystanders": _share(stays for one in samples for stays in one["bystanders"]),
        "first_frame": median(first),
        "first_frame_holds": _share(value >= FIRST_FRAME for value in first),
        "first_frame_least": min(first),
        "psnr": mean(one["psnr"] for one in samples),
        "ssim": mean(one["ssim"] for one in samples),
        "gain": _of(median, gain),
        "gain_mean": _of(mean, gain),
    }


def summarised_costs(samples: list[dict]) -> dict[str, dict[str, float]]:
    """By choice, against the exact path of the same scene in the same process."""
    costs = {}
    pairs = [(choice, one["choices"][0]) for one in samples for choice in one["choices"]]
    for name in _in_order([choice for choice, _ in pairs], "choice"):
        of = [(choice, exact) for choice, exact in pairs if choice["choice"] == name]
        costs[name] = {
            "to_exact": mean(choice["to_exact"] for choice, _ in of),
            "to_exact_least": min(choice["to_exact"] for choice, _ in of),
            "change": mean(choice["psnr"] - exact["psnr"] for choice, exact in of),
            "followed": _share(choice["followed"] for choice, _ in of),
            "computed": median(choice["computed"] for choice, _ in of),
            "sample_time": median(choice["sample_s"] / exact["sample_s"] for choice, exact in of),
            "total_time": median(choice["total_s"] / exact["total_s"] for choice, exact in of),
        }
    return costs


def report(about: dict, by_set: dict[str, list[dict]], summary: Summary, costs: dict) -> str:
    """All of it in Markdown."""
    videos = {name: samples for name, samples in by_set.items() if "events" in samples[0]}
    parts = [
        "# Quality of the demo models",
        "\n".join(f"* {name}: {value}" for name, value in about.items()),
        _section("Bounds", ("set", "what", "measured", "bound", "holds"), bound_rows(summary)),
        _section(
            "Videos against the true clips",
            ("set", *COLUMNS),
            [(name, *(_cell(summary[name], of) for of in COLUMNS.values())) for name in videos],
        ),
        _other_sets(summary),
        _section(
            "Costs",
            (
                "choice",
                "PSNR to exact",
                "least",
                "PSNR to truth",
                "followed",
                "evaluations",
                "sampling time",
                "whole job",
            ),
            [_cost_row(name, cost) for name, cost in costs.items()],
            "PSNR in dB, 100 for equal frames. Times are ratios to the exact path, medians of the scenes.",
        ),
        _section(
            "Drift, the last section against the first",
            _DRIFT_HEADS,
            _drift_rows(videos),
            "Brightness is a difference in grey levels, the others are ratios: median, and furthest off.",
        ),
        _failures(by_set),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def bound_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Of the bounds whose figure was measured."""
    rows = []
    for bound in BOUNDS:
        value = summary.get(bound.set, {}).get(bound.figure)
        if value is not None:
            holds = "✓" if value >= bound.least else "✗"
            least = f"≥ {100 * bound.least:g} %" if bound.figure in SHARES else f"≥ {bound.least:g}"
            rows.append((bound.set, bound.what, _shown(bound.figure, value), least, holds))
    return rows


def _other_sets(summary: Summary) -> str:
    parts = []
    if vae := summary.get("vae"):
        rows = [
            (what, _cell(vae, of), _cell(vae, f"{of}_least"))
            for what, of in (
                ("clips of the world", "world"),
                ("photographs, still", "stills"),
                ("photographs, moving", "photograph_clips"),
            )
        ]
        parts.append(_section("VAE, encoded and decoded", ("what", "PSNR, mean (dB)", "least"), rows))
    if control := summary.get("control"):
        row = (_cell(control, "n"), _cell(control, "true_followed"), _cell(control, "wrong_followed"))
        parts.append(
            _section("Wrong prompts", ("n", "what the scene is for is seen", "what was asked is"), [row])
        )
    return "\n\n".join(parts)


def _cost_row(name: str, cost: dict[str, float]) -> tuple[str, ...]:
    return (
        name,
        f"{cost['to_exact']:.1f}",
        f"{cost['to_exact_least']:.1f}",
        f"{cost['change']:+.2f}",
        f"{cost['followed']:.0%}",
        f"{cost['computed']:g}",
        f"{cost['sample_time']:.2f}",
        f"{cost['total_time']:.2f}",
    )


_DRIFT_HEADS = ("set", *(head for statistic in NEUTRAL for head in (statistic, "worst")))


def _drift_rows(videos: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    """Of the long videos, and of the true clips, which change too."""
    rows = []
    for name, samples in videos.items():
        long = [one for one in samples if "drift" in one]
        for of, whose in (("drift", name), ("true_drift", f"{name}, truth")) if long else ():
            cells = []
            for statistic, neutral in NEUTRAL.items():
                values = [one[of][statistic] for one in long]
                worst = max(values, key=lambda value: abs(value - neutral))
                form = ".2f" if neutral else "+.1f"
                cells += [format(median(values), form), format(worst, form)]
            rows.append((whose, *cells))
    return rows


def _failures(by_set: dict[str, list[dict]]) -> str:
    lines = []
    for name, samples in by_set.items():
        failed = [one for one in samples if _has_failed(one)]
        lines += [
            f"* {name}, {one['kind']} {one['index']}: “{one['prompt']}” – {_why(one)}"
            for one in failed[:MOST_FAILURES]
        ]
        if len(failed) > MOST_FAILURES:
            lines.append(f"* {name}: and {len(failed) - MOST_FAILURES} more in quality.json")
    return "\n".join(["## Failures", "", *lines]) if lines else ""


def _has_failed(one: dict) -> bool:
    if "control" in one:
        return one["true_followed"]
    if "events" not in one:
        return False
    if any(bound.set == one["set"] and bound.figure == "kept" for bound in BOUNDS):
        return not all(one["kept"])  # so long a video need not follow
    return not (one["followed"] and all(one["bystanders"]))


def _why(one: dict) -> str:
    if "control" in one:
        return f"asked for what is wrong ({one['control']}), and the scene's own meaning is seen"
    reasons = []
    for event in one["events"]:
        if not event["followed"]:
            far = "" if event["travel"] is None else f", {event['travel']:.2f} of the way"
            reasons.append(f"not seen: {event['event']}{far}")
    reasons += ["a bystander did not stay"] * (not all(one["bystanders"]))
    reasons += ["a shape was not kept"] * (not all(one["kept"]))
    return "; ".join(reasons)


def draw(summary: Summary, costs: dict, path: Path) -> None:
    """Left, how many prompts are followed in each set; right, what each choice costs and saves."""
    from matplotlib.figure import Figure  # here, as nothing else needs it

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    followed = {name: of["followed"] for name, of in summary.items() if of.get("followed") is not None}
    left.barh([*followed], [100 * share for share in followed.values()], color="steelblue")
    bounds = [bound for bound in BOUNDS if bound.figure == "followed" and bound.set in followed]
    left.plot(
        [100 * bound.least for bound in bounds],
        [bound.set for bound in bounds],
        "r|",
        markersize=22,
        markeredgewidth=2,
    )
    left.invert_yaxis()
    left.set(xlim=(0, 100), xlabel="% of prompts followed; red: the bound")
    top = 2 + max((cost["to_exact"] for cost in costs.values() if cost["to_exact"] < EQUAL), default=0.0)
    for family, of in _families(name for name in costs if name != "exact").items():
        points = [(costs[name]["sample_time"], min(costs[name]["to_exact"], top)) for name in of]
        right.plot(*zip(*points, strict=True), "o-", label=family, markersize=4)
        for name, point in zip(of, points, strict=True):
            if name != family:
                right.annotate(name.split()[-1], point, (4, 3), textcoords="offset points", fontsize=7)
    if costs:
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    right.set(xlabel="sampling time, exact = 1", ylabel="PSNR to the exact video, dB (at the top: equal)")
    figure.savefig(path, dpi=120)


def _families(choices: Iterable[str]) -> dict[str, list[str]]:
    """Those that differ by a number go together: "steps" → "steps 20", "steps 15"; others are alone."""
    families: dict[str, list[str]] = {}
    for name in choices:
        word, _, value = name.partition(" ")
        families.setdefault(word if value[:1].isdigit() else name, []).append(name)
    return families


def _section(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]], note: str = "") -> str:
    """A heading and its table, or nothing without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    heads = [*heads]
    table = "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines])
    return "\n\n".join(part for part in (f"## {title}", note, table) if part)


def _cell(figures: dict[str, float | None], figure: str) -> str:
    value = figures.get(figure)
    return "–" if value is None else _shown(figure, value)


def _shown(figure: str, value: float) -> str:
    if figure in SHARES:
        return f"{100 * value:.1f} %"
    return str(value) if isinstance(value, int) else f"{value:.{3 if figure == 'ssim' else 1}f}"


def _share(holds: Iterable[bool | None]) -> float | None:
    return _of(mean, [float(one) for one in holds if one is not None])


def _of(statistic, values: Iterable[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return statistic(values) if values else None


def _in_order(found: list[dict], key: str) -> list[str]:
    return list(dict.fromkeys(one[key] for one in found))
