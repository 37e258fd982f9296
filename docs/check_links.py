"""Check the links of the built site offline: `python docs/check_links.py docs/_build/html`.

Links to files and anchors of the site must exist. Links to other sites are only checked for their form, and nothing
that a page loads by itself (scripts, styles, pictures, fonts) may come from another site.
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Dict, List, Set, Tuple
from urllib.parse import unquote, urlsplit

_LOADED = {'script': 'src', 'img': 'src', 'link': 'href', 'iframe': 'src', 'source': 'srcset', 'video': 'src'}
_NOT_LOADED = {'canonical', 'next', 'prev', 'index', 'search', 'author', 'help'}  # values of rel in <link>
_CSS_URL = re.compile(r'url\(\s*[\'"]?((?:https?:)?//[^)\'"]+)|@import\s+[\'"]((?:https?:)?//[^\'"]+)')


class Page(HTMLParser):
    """The anchors, the links, and what is loaded, of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: Set[str] = set()
        self.links: List[str] = []
        self.loaded: List[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, str]]) -> None:
        attrs = dict(attrs)
        for key in ('id', 'name'):
            if attrs.get(key):
                self.anchors.add(attrs[key])
        if tag == 'a' and attrs.get('href') is not None:
            self.links.append(attrs['href'])
        elif tag in _LOADED and attrs.get(_LOADED[tag]):
            if tag != 'link' or not _NOT_LOADED & set((attrs.get('rel') or '').split()):
                self.loaded.append(attrs[_LOADED[tag]])


def check(folder: Path) -> Tuple[List[str], int]:
    """Return the faults of a site, and the number of links that were checked."""
    pages: Dict[Path, Page] = {
        path.resolve(): Page(path.read_text(encoding='utf-8')) for path in sorted(folder.rglob('*.html'))}
    faults: List[str] = []
    count = 0
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for link in page.links + page.loaded:
            count += 1
            url = urlsplit(link)
            if url.scheme == 'data':
                continue
            if url.scheme or url.netloc:
                if link in page.loaded:
                    faults.append(f'{name} loads {link}')
                elif url.scheme == 'mailto':
                    continue
                elif url.scheme != 'https' or not re.fullmatch(r'[\w-]+(\.[\w-]+)+', url.netloc) or ' ' in link:
                    faults.append(f'{name} has a malformed link {link}')
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if target.is_dir():
                target /= 'index.html'
            if not target.is_file():
                faults.append(f'{name} links to {link}, which does not exist')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                faults.append(f'{name} links to {link}, which has no such anchor')
    for path in sorted(folder.rglob('*.css')):
        faults += [f'{path.relative_to(folder)} loads {a or b}' for a, b in _CSS_URL.findall(path.read_text('utf-8'))]
    return faults, count


def main() -> None:
    folder = Path(sys.argv[1])
    faults, count = check(folder)
    if not count:
        sys.exit(f'error: There are no pages in {folder}.')
    print(*faults, f'{count} links, {len(faults)} faults', sep='\n')
    if faults:
        sys.exit(1)


if __name__ == '__main__':
    main()
