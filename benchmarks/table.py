"""Make the table of README.md from results/*.json: `python benchmarks/table.py`, or `--check` to fail if it is out of date.

What a result file holds: `result_file.py`. Rows keep the order of their files' names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- table: made by table.py -->\n", "<!-- end of table -->\n"
HEADER = (
    "| benchmark | case | unit | ours | peer | peer is | ratio | limit | of limit | device | date |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the table of benchmarks/README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is out of date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    fresh = with_table(text, [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("results/*.json"))])
    if check and fresh != text:
        print(f"{README}: the table is out of date; run python benchmarks/table.py", file=sys.stderr)
        return 1
    if not check:
        README.write_text(fresh, encoding="utf-8")
    return 0


def with_table(text: str, results: list[dict[str, Any]]) -> str:
    """`text` with what stands between the two markers replaced; results without `rows` are no measurements against a peer."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [line(result, row) for result in results for row in result.get("rows", [])]
    return before + BEGIN + (HEADER + "".join(lines) if lines else "No results yet.\n") + END + after


def line(result: dict[str, Any], row: dict[str, Any]) -> str:
    cells = [
        result["name"],
        row["case"],
        row["unit"],
        with_spread(row, "ours"),
        with_spread(row, "peer"),
        row["peer_name"],
        row["ratio_to_peer"],
        row["limit"],
        row["ratio_to_limit"],
        result["device"],
        result["date"],
    ]
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |\n"


def with_spread(row: dict[str, Any], side: str) -> str:
    if row[side] is None:
        return ""
    spread = (row.get("spread") or {}).get(side)
    return f"{row[side]} ({spread[0]} to {spread[1]})" if spread else str(row[side])


if __name__ == "__main__":
    sys.exit(main())
