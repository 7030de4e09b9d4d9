"""What works with what, as a table for docs/data.md."""

from pathlib import Path
from typing import Any

from stillhouse.analysis.tables import markdown_table
from stillhouse.metrics.provenance import short_revision

_LETTERS = {"edm": "E", "ddpm": "D", "flow": "F"}
_TRAINED = "trained"


def support_table(content: dict[str, Any], recipes: Path) -> str:
    """content: of results/support.json. A letter for each family of teachers; bold where conf/recipe has the pair's settings."""
    outcomes = content["outcomes"]
    data = list(next(iter(outcomes.values())))
    rows = [["method", *data]]
    for method, found in outcomes.items():
        rows.append(
            [f"`{method}`", *(_cell(found[name], recipes / f"{method.replace(' ', '_')}_{name}.yaml") for name in data)]
        )
    commit = short_revision(content["commit"])
    source = f"From `results/support.json`: commit {commit}, {content['date']}, {content['machine']}."
    return f"{chr(10).join(markdown_table(rows))}\n\n{source}"


def _cell(families: dict[str, str], recipe: Path) -> str:
    letters = " ".join(_LETTERS[family] for family, outcome in families.items() if outcome == _TRAINED)
    return f"**{letters}**" if letters and recipe.exists() else letters
