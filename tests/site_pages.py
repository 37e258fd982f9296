"""The Markdown pages of the documentation, and the code in them."""
import re
from pathlib import Path
from typing import List, NamedTuple, Optional

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(  # the notebooks in tutorials/ are run by the build of the site
    page for page in DOCS.rglob('*.md') if not {'_build', 'tutorials'} & set(page.relative_to(DOCS).parts))

_FENCE = re.compile(r'(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$', re.M | re.S)


class Fence(NamedTuple):
    """A fenced block of code.

    Args:
        language: Such as `python`.
        code: The code.
        line: Number of its first line in the page.
        reason: Why it is not run, from a comment `<!-- not run: REASON -->` in the line before; None if it is run.
    """
    language: str
    code: str
    line: int
    reason: Optional[str]


def read_fences(page: Path, language: str) -> List[Fence]:
    """Return the fences of a page in one language."""
    text = page.read_text(encoding='utf-8')
    return [
        Fence(m['language'], m['code'], text.count('\n', 0, m.start('code')) + 1, m['reason'])
        for m in _FENCE.finditer(text) if m['language'] == language]


def page_id(page: Path) -> str:
    return str(page.relative_to(DOCS))
