"""docs/methods.md has a row for every method, which leads to its section, and quotes what was measured."""

import json
import re
from pathlib import Path

import pytest

from sslmed.methods import METHODS
from sslmed.shipped import shipped

TOP = Path(__file__).parents[2]
PAGE = TOP / "docs" / "methods.md"
RESULTS = TOP / "benchmarks" / "results" / "methods"
COLUMNS = ["method", "idea", "use it when", "time", "memory", "one 24 GB GPU", "eight large GPUs"]


def rows() -> dict[str, list[str]]:
    """The cells of each method's row."""
    table = [line.strip("|\n ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    assert COLUMNS in table
    linked = {re.match(r"\[`(\w+)`\]", line[0]): line for line in table}
    return {name[1]: line for name, line in linked.items() if name}


def test_the_table_has_every_method_in_the_order_of_the_dictionary() -> None:
    assert list(rows()) == list(METHODS)
    assert all(len(line) == len(COLUMNS) and all(line) for line in rows().values())


@pytest.mark.parametrize("name", METHODS)
def test_a_row_leads_to_the_section_and_quotes_the_measured_cost(name: str) -> None:
    line = rows()[name]
    link = re.match(r"\[`\w+`\]\((methods/\w+\.md)#([\w-]+)\)$", line[0])
    assert link, line[0]
    headings = re.findall(r"^## (.+)$", (PAGE.parent / link[1]).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert link[2] in [heading.lower().replace(" ", "-") for heading in headings]
    result = RESULTS / f"cost-{name}.json"
    found = json.loads(result.read_text(encoding="utf-8"))["result"] if result.exists() else None
    assert line[3:5] == ([f"{found['with views']:.2f}", f"{found['memory']:.2f}"] if found else ["–", "–"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe_for_x_rays(name: str) -> None:
    assert {f"xray/{name}_resnet18", f"xray/{name}_vit_tiny"} & {recipe.name for recipe in shipped()}
