"""What `fxquant.convert` makes of quantized checkpoints: `python tests/benchmarks/convert_table.py FOLDER --markdown`.

FOLDER holds one directory for each checkpoint; those of this repository are in tests/data/checkpoints.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fxquant.conversion import convert
from fxquant.conversion_report import Conversion
from fxquant.conversion_targets import FORMATS
from fxquant.errors import FileError
from fxquant.tables import Table

HEAD = """# What `fxquant.convert` makes of quantized checkpoints

Made by `python tests/benchmarks/convert_table.py FOLDER --markdown`, on {count} tiny random models that other libraries
quantized.

* **exact**: every weight is bit for bit what it was, also where its scheme has another name in the other format.
* A number is the largest relative squared error that was added to a weight, which was quantized again in the scheme
  behind it: the one of that format that is nearest to its own.
* **full precision**: the format has no place for such a weight.
* **-**: the format is for models of another architecture, or transformers cannot read experts in it.

| from | {formats} |
| --- |{rules}
"""


def outcome(done: Conversion) -> str:
    """One cell."""
    floats = [one for one in done.matrices if one.after in ("bfloat16", "float16", "float32")]
    others = [one for one in done.matrices if one not in floats]
    rest = f", {len(floats)} of {len(done.matrices)} in full precision" if floats else ""
    changed = [one for one in others if one.error is not None]
    if not changed:
        return f"exact{rest}"
    worst = max(changed, key=lambda one: one.error or 0.0)
    return f"{worst.error:.1e} {worst.after}{rest}"


def rows_of(folder: Path) -> list[tuple[str, ...]]:
    """A row for each directory."""
    rows = []
    for meta in sorted(folder.glob("*/meta.json")):
        cells = []
        for to in FORMATS:
            with tempfile.TemporaryDirectory() as place:
                try:
                    done = convert(
                        meta.parent, Path(place) / f"out{'.gguf' if to == 'gguf' else ''}", to, progress=False
                    )
                    cells.append(outcome(done))
                except FileError as error:
                    cells.append("-" if to == "gpt-oss" or "matrices of experts" in str(error) else str(error))
        rows.append((json.loads(meta.read_text())["format"], *cells))
    return sorted(rows)


def main() -> None:
    """Convert and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the text of convert_table.md")
    options = parser.parse_args()
    rows = rows_of(options.folder)
    if not options.markdown:
        print(Table(title="convert", columns=("from", *FORMATS), rows=tuple(rows)))
        return
    print(HEAD.format(count=len(rows), formats=" | ".join(FORMATS), rules=" --- |" * len(FORMATS)), end="")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
