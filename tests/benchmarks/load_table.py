"""What `fxquant.load` makes of checkpoints that other libraries wrote: the table of the README.

    python tests/benchmarks/load_table.py [FOLDER] [--markdown]

FOLDER holds directories as `tests/data/checkpoints` does: a checkpoint, `meta.json` (what it is, and what wrote it) and
`expected.safetensors` (weights that the reference library decodes, and logits of the model that they make). `weights`
is the largest distance from these weights by the largest of them, `logits` the relative distance of the logits, in
float32. Schemes that quantize activations too differ from logits that leave this out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fxquant import load
from fxquant.expert_modules import QExperts
from fxquant.modules import QLinear
from fxquant.tables import Table

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints"
COLUMNS = ("format", "producer", "stored as", "weights", "logits")
_OTHERS = ("input_ids", "expected_logits", "native_logits")


def weight_of(model: nn.Module, name: str) -> Tensor:
    """By the name of a linear's weight, of one expert's matrix, or of a parameter that stacked experts had."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        container, e, projection = owner.rsplit(".", 2)
        experts: Any = model.get_submodule(container)
        found: Tensor = experts.weight_of(projection, int(e))
        return found
    if isinstance(module, QExperts):
        return module.restore().get_parameter(leaf).detach()
    weight: Tensor = getattr(module, leaf)
    return weight.detach()


def measure(path: Path) -> tuple[str, ...]:
    """One row."""
    meta, expected = json.loads((path / "meta.json").read_text()), load_file(path / "expected.safetensors")
    model: Any = load(path, dtype=torch.float32, progress=False)
    worst = 0.0
    for name, tensor in expected.items():
        if name not in _OTHERS:
            found = weight_of(model, name)[: len(tensor)]
            worst = max(worst, float((found - tensor).abs().max() / tensor.abs().max()))
    with torch.no_grad():
        logits = model(expected["input_ids"].long(), use_cache=False).logits
    wanted = expected["expected_logits"]
    schemes: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QLinear):
            schemes[module.spelling] += 1
        elif isinstance(module, QExperts):
            schemes.update(str(scheme) for _, _, scheme in module.matrices() if scheme is not None)
    error = f"{float((logits - wanted).norm() / wanted.norm()):.1e}"
    return (
        meta["format"],
        meta["producer"].split("(")[0].strip(),
        ", ".join(f"`{name}`" for name, _ in schemes.most_common(3)),
        "exact" if worst == 0 else f"{worst:.1e}",
        f"{error} (activations)" if meta.get("activation_quant") else error,
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The table as the README shows it."""
    lines = [COLUMNS, ("---", "---", "---", "---:", "---:"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="of checkpoints with what is expected")
    parser.add_argument("--markdown", action="store_true", help="print the table as the README shows it")
    options = parser.parse_args()
    rows = [measure(path.parent) for path in sorted(options.folder.glob("*/meta.json"))]
    if options.markdown:
        print(markdown(rows))
    else:
        print(Table("loaded", COLUMNS, tuple(rows), right=frozenset({3, 4})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
