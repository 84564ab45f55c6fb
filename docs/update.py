"""Wall time of an update epoch against bare steps: python docs/update.py RUN

Bare: `train.update_step` of the run's network at rate 0 on one batch already in memory. Epoch:
the last one of RUN's last round, from loading the images on. Neither is saved.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from data import InputError, need, say


def bare(run, batch, steps):
    """Seconds of `steps` steps on one batch."""
    start = time.perf_counter()
    for _ in range(steps):
        train.update_step(run, run.net, batch, 0.0, "a bare step")
    return time.perf_counter() - start


def nothing():
    """In place of run.save: what is measured is thrown away."""


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    folder = parser.parse_args().run
    run = train.reopen(folder, {"workers": -1}, ("workers",))  # loaders: this machine's default
    run.save = nothing
    r = run.cfg.rounds
    end = train.epochs_before(run.cfg, r + 1)
    need(r and run.epoch == end, f"{folder}: expected a finished run with a round; --resume it")
    run.epoch = end - 1  # one epoch is left to do
    loader = train.batches(run, r, run.epoch)
    batch = next(iter(loader))
    run.net.train()
    run.net.backbone.train(run.cfg.weights == "none")
    bare(run, batch, 3)
    before = bare(run, batch, len(loader))
    start = time.perf_counter()
    train.update(run, r)
    epoch = time.perf_counter() - start
    after = bare(run, batch, len(loader))  # before and after: clocks drift
    print(f"{len(loader)} steps of {loader.batch_size}: update epoch {epoch:.1f} s; bare "
          f"{before:.1f} and {after:.1f} s; ratio {2 * epoch / (before + after):.2f}")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except InputError as fault:
        say(f"update.py: {fault}", stream=sys.stderr)
        sys.exit(2)
