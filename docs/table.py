"""The README's result tables from finished runs: python docs/table.py RUN ...

One run: every stage, every round. Several: the headline figures of each, and their mean and standard deviation. Outside VOC, where
there is no core-7, the headline figures are mIoU.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import CORE

def percent(x):
    """0.1234 -> 12.3; empty for None."""
    return "" if x is None else f"{100 * x:.1f}"

def labels(results):
    """{"labels of round 1": their summary, ...}"""
    return {f"labels of round {name.removeprefix('round')}": s for name, s in results["labels"].items()}

def one(folder):
    """Print the table of stages and the table of rounds of one run."""
    results = json.loads((folder / "results.json").read_text())
    rows = {f"train, {name}": s for name, s in (results["train"] or {}).items()}
    rows |= {f"train, {name}": s for name, s in labels(results).items()} | {"val, segmentation head": results["val"]["seg"]}
    columns = sorted(CORE)
    print("| | core-7 | mIoU | peak core-7 (threshold) | mIoU there | " + " | ".join(columns) + " |\n|" + "---|" * (5 + len(columns)))
    for name, s in rows.items():
        if not s:
            continue
        peak = s.get("peak")
        print(f"| {name} | {percent(s['core'])} | {percent(s['miou'])} | " +
              (f"{percent(peak['core'])} ({peak['threshold']:.2f}) | {percent(peak['miou'])} | " if peak else "| | ") +
              " | ".join(percent(s["iou"].get(k)) for k in columns) + " |")
    print("\n| round | val core-7 | val mIoU |\n|---|---|---|")
    for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "val_core" in m:
            print(f"| {m['round']} | {percent(m['val_core'])} | {percent(m['val_miou'])} |")

def headline(folder):
    """Peak core of the raw and of the refined maps, core of every round's labels, val core after each round, val mIoU."""
    results = json.loads((folder / "results.json").read_text())
    core = lambda s: s["miou"] if s["core"] is None else s["core"]
    maps = {f"{text} maps, peak": core(results["train"][name]["peak"]) for text, name in (("raw", "cam"), ("refined", "self_guided"))
            if results["train"]}
    rounds = [core({"miou": m["val_miou"], "core": m["val_core"]})
              for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "val_core" in m]
    return {**maps, **{name: core(s) for name, s in labels(results).items()},
            **{f"val after round {n}": x for n, x in enumerate(rounds, 1)},
            **({"val mIoU": results["val"]["seg"]["miou"]} if results["val"]["seg"] else {})}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folders = [Path(name) for name in sys.argv[1:]]
    if len(folders) == 1:
        one(folders[0])
    else:
        rows = [headline(folder) for folder in folders]
        names = list(dict.fromkeys(name for row in rows for name in row))
        print("| core-7 | " + " | ".join(names) + " |\n|" + "---|" * (1 + len(names)))
        for folder, row in zip(folders, rows):
            print(f"| {folder.name} | " + " | ".join(percent(row.get(name)) for name in names) + " |")
        spread = lambda x: f"{100 * np.mean(x):.1f} ± {100 * np.std(x, ddof=1):.1f}" if len(x) == len(rows) and None not in x else ""
        print("| mean ± deviation | " + " | ".join(spread([row[name] for row in rows if name in row]) for name in names) + " |")
