"""The tables of the benchmarks are those of the committed results."""
import json

from benchmarks.tables import FOLDER, events_tables, update


def test_tables_are_in_step():
    readme = (FOLDER / 'README.md').read_text(encoding='utf-8')
    results = json.loads((FOLDER / 'events.json').read_text(encoding='utf-8'))
    assert update(readme, results) == readme and events_tables(results) in readme
