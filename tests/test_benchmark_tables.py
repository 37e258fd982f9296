"""Tables in benchmarks/README.md."""
import json

from benchmarks.tables import FOLDER, events_tables, update


def test_readme_tables_match_committed_results():
    readme = (FOLDER / 'README.md').read_text(encoding='utf-8')
    results = json.loads((FOLDER / 'events.json').read_text(encoding='utf-8'))
    assert update(readme, results) == readme and events_tables(results) in readme
