"""The result tables of docs/RESULTS.md, from finished runs: python docs/table.py RUN ...

One run: every row of its results.json, and what metrics.jsonl says of every round. Several: the
headline figures of each, then their mean and standard deviation. In %: core-7 where the classes
are VOC's, else mIoU.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import CORE, InputError, need, read_text, refusing, say


def read_run(folder):
    """results.json, {name of a row: scores}, and the rows of metrics.jsonl. Raises InputError."""
    fix = "expected a run of this version; python train.py --eval RUN"
    results = read_text(folder / "results.json")
    metrics = read_text(folder / "metrics.jsonl")
    with refusing(f"{folder}: its results cannot be read", fix):
        results = json.loads(results)
        metrics = [json.loads(line) for line in metrics.splitlines()]
    scored = all(isinstance(s, dict) and "decided" in s for s in results.values())
    need(scored, f"{folder}: results of another version; {fix}")
    return results, metrics


def percent(x):
    """0.1234 -> 12.3; empty for None."""
    return "" if x is None else f"{100 * x:.1f}"


def print_table(heads, rows):
    """A markdown table of texts."""
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")


def core(miou, core7):
    """core-7, or mIoU where there is none."""
    return miou if core7 is None else core7


def one(folder):
    """Print the scores of every stage of a run, then a line a round."""
    results, metrics = read_run(folder)
    names = list(dict.fromkeys(name for s in results.values() for name in s["iou"]))
    has_core = any(s["core"] is not None for s in results.values())
    names = sorted(CORE) if has_core else names
    rows = []
    for row, s in results.items():
        values = [s["core"], s["miou"], s["decided"], *(s["iou"].get(name) for name in names)]
        rows.append([row, *(percent(x) for x in values)])
    if rows:
        print_table(["", "core-7", "mIoU", "decided", *names], rows)
        print()
    rounds = {}
    for m in metrics:
        rounds.setdefault(m.get("round"), {}).update(m | m.get("shares", {}))
    keys = ("undecided", "background", "val_core", "val_miou")
    rows = [[str(r), *(percent(m.get(key)) for key in keys)] for r, m in rounds.items() if r]
    print_table(["round", "labels: undecided", "background", "val core-7", "val mIoU"], rows)


def headline(folder):
    """{"train cam": x, ..., "labels round1": x, "val round1": x, "val mIoU": x} of one run."""
    results, metrics = read_run(folder)
    figures = {name: core(s["miou"], s["core"]) for name, s in results.items() if name != "val seg"}
    for m in metrics:
        if m["what"] == "val":
            figures[f"val round{m['round']}"] = core(m["val_miou"], m["val_core"])
    if "val seg" in results:
        figures["val mIoU"] = results["val seg"]["miou"]
    return figures


def several(folders):
    """Print the headline figures of runs, a line each, and the mean where every run has one."""
    runs = [headline(folder) for folder in folders]
    names = list(dict.fromkeys(name for run in runs for name in run))
    rows = []
    for folder, run in zip(folders, runs):
        rows.append([folder.name, *(percent(run.get(name)) for name in names)])
    last = ["mean ± deviation"]
    for name in names:
        x = [run[name] for run in runs if name in run]
        full = len(x) == len(runs)
        last.append(f"{percent(np.mean(x))} ± {percent(np.std(x, ddof=1))}" if full else "")
    print_table(["in %", *names], [*rows, last])


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", nargs="+", type=Path, help="folder of a finished run")
    runs = parser.parse_args().run
    if len(runs) == 1:
        one(runs[0])
    else:
        several(runs)


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        say(f"table.py: {fault}", stream=sys.stderr)
        sys.exit(2)
