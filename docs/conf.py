"""Configuration of the documentation, which builds offline: `sphinx-build -W -n -b html docs docs/_build/html`."""
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, List

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.results import read_results  # noqa: E402
from benchmarks.tables import RESULTS, update  # noqa: E402
from timm_spikformer import __version__  # noqa: E402

_URLS = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']

project = 'timm-spikformer'
author = 'The timm-spikformer authors'
copyright = author
release = __version__
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton', 'sphinx_design']
exclude_patterns = ['_build', '**/.ipynb_checkpoints', 'tutorials/output']
default_role = 'code'  # single backticks in docstrings

# MyST, and notebooks in tutorials/, which are Markdown in jupytext's format
myst_enable_extensions = ['attrs_inline', 'colon_fence', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = os.environ.get('DOCS_NOTEBOOKS', 'off')  # off, cache or force
nb_execution_raise_on_error = True
nb_execution_timeout = 600

# autodoc
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
autodoc_typehints_format = 'short'
autodoc_member_order = 'bysource'
autodoc_class_signature = 'mixed'
autoclass_content = 'both'
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = 'hide'
# Types of other projects: links to them would need the network
nitpick_ignore_regex = [
    ('py:.*', r'(torch|timm|transformers|numpy|np|nn|spikingjelly|collections|typing|pathlib|os|rich)\..*'),
    ('py:.*', r'huggingface_hub\..*'),
    ('py:.*', r'(Tensor|Path|PathLike|Any|ndarray|Console|optional|Namespace|TransformersKwargs)'),
    ('py:.*', r'(.*\.)?(SummaryWriter|_Number)'),
]

# HTML
html_theme = 'furo'
html_title = f'timm-spikformer {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    'source_repository': _URLS['Repository'],
    'source_branch': 'main',
    'source_directory': 'docs/',
    'light_css_variables': {'color-brand-primary': '#b5440a', 'color-brand-content': '#b5440a'},
    'dark_css_variables': {'color-brand-primary': '#ff9d5c', 'color-brand-content': '#ff9d5c'},
}
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True

# Files outside this folder that are pages of the site, or parts of one. A page contains a line
#     See [FILE](PATH). <!-- include -->
# which is a link on GitHub. On the site, it is replaced by the content of the file without its title.
_INCLUDE = re.compile(r'^See \[[^\]]+\]\((\S+)\)\. <!-- include -->$', re.M)
_TOCTREE = re.compile(r'^```\{toctree\}\n.*?^```$', re.M | re.S)
_LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)')
_PAGES = {  # pages of the site for links in these files
    'README.md': '/index.md', 'CHANGELOG.md': '/changelog.md', 'CONTRIBUTING.md': '/contributing.md',
    'benchmarks/README.md': '/results/benchmarks.md', 'reproduction/README.md': '/results/reproduction.md',
}


def adapt_links(text: str, source: Path, folder: Path) -> str:
    """Adapt the relative links of a Markdown file to another folder.

    Links to pictures, and to files that are pages of the site, lead there; other relative links lead to the repository.

    Args:
        text: Content of the file.
        source: The file.
        folder: Folder of the page that includes it.
    """
    def adapt(match: 're.Match[str]') -> str:
        mark, label, target = match.groups()
        if re.match(r'[a-z]+:|#', target):
            return match[0]
        path, _, anchor = target.partition('#')
        path = (source.parent / path).resolve()
        if mark:
            return f'![{label}]({os.path.relpath(path, folder)})'
        page = _PAGES.get(os.path.relpath(path, ROOT))
        if page is None and path.is_relative_to(DOCS) and path.suffix == '.md':
            page = f'/{path.relative_to(DOCS)}'
        if page is None:
            page = f'{_URLS["Repository"]}/blob/main/{os.path.relpath(path, ROOT)}'
        return f'[{label}]({page}{"#" if anchor else ""}{anchor})'

    return _LINK.sub(adapt, text)


def include(text: str, folder: Path) -> str:
    """Replace the `include` lines of a page in a folder by the content of the files that they link to."""
    def read(match: 're.Match[str]') -> str:
        path = (folder / match[1]).resolve()
        content = path.read_text(encoding='utf-8')
        if path == ROOT / 'benchmarks' / 'README.md':
            content = update(content, read_results(RESULTS))
        content = re.sub(r'\A\s*# .*\n', '', content)
        return adapt_links(content, path, folder)

    return _INCLUDE.sub(read, text)


def _read_source(app: Any, docname: str, source: List[str]) -> None:
    source[0] = include(source[0], (DOCS / docname).parent)
    if docname == 'tutorials/index' and not any(re.match('tutorials/(?!index)', name) for name in app.env.found_docs):
        source[0] = _TOCTREE.sub('There are none yet.\n', source[0])  # an empty list would be a warning


def setup(app: Any) -> None:
    app.connect('source-read', _read_source)
