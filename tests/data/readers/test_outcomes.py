import importlib.util
from pathlib import Path

SOURCE = Path(__file__).with_name("outcomes.py")


def test_the_table_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("outcomes", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    outcomes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outcomes)
    page = outcomes.PAGE.read_text(encoding="utf-8")
    written = page.partition(outcomes.START)[2].partition(outcomes.END)[0]
    assert written.strip().splitlines() == outcomes.table().strip().splitlines()
