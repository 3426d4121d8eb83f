"""Runs the benchmarks: ``python -m bench [--quick] [PART ...]``. See `make bench`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from bench import (
    cluster,
    controlplane,
    footprint,
    harness,
    moving,
    throughput,
    tracking,
    traffic,
    transfer,
    wakes,
)

PARTS = {
    "wakes": wakes,
    "footprint": footprint,
    "throughput": throughput,
    "tracking": tracking,
    "traffic": traffic,
    "cluster": cluster,
    "controlplane": controlplane,
    "moving": moving,
    "transfer": transfer,
}


def table(records: list[dict[str, Any]]) -> str:
    """The results as columns."""
    head = ["what", "subject", "workload", "n", "p50 / value", "p99 / 95 %"]
    rows = [head]
    for one in records:
        if "p50_ms" in one:
            figures = [f"{one['p50_ms']:.1f} ms", f"{one['p99_ms']:.1f} ms"]
        else:
            interval = f"{one['low']:g} to {one['high']:g}" if "low" in one else ""
            value = one["value"]
            shown = f"{value:.0f}" if value >= 1000 else f"{value:g}"
            figures = [f"{shown} {one['unit']}", interval]
        rows.append([one["name"], one["subject"], one["workload"], str(one["n"]), *figures])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Program; leaves the daemon as it was."""
    arguments = argparse.ArgumentParser(prog="bench")
    arguments.add_argument("--quick", action="store_true", help="few samples, to see that it works")
    arguments.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    options = arguments.parse_args()
    ours = subprocess.run([harness.ARCHITECT, "ps"], capture_output=True, check=False).returncode
    if ours:
        harness.run([harness.ARCHITECT, "up"])
    harness.RESULTS.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    try:
        for part in options.parts:
            print(f"{part}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            found: list[dict[str, Any]] = []
            for bench in PARTS[part].all_runs(options.quick):
                found += bench()
                print(table(found[-2:]), file=sys.stderr, flush=True)
            lines = "".join(json.dumps(one) + "\n" for one in found)
            (harness.RESULTS / f"{part}.jsonl").write_text(lines)
            records += found
    finally:
        if ours:
            harness.run([harness.ARCHITECT, "down"])
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
