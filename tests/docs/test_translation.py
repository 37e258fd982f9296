"""The Chinese quickstart has the code of the English one."""
import re

from site_pages import DOCS, read_fences


def test_code_is_equal():
    english, chinese = DOCS / 'quickstart.md', DOCS / 'zh/quickstart.md'
    for language in ('python', 'bash'):
        expected = [fence.code for fence in read_fences(english, language)]
        assert expected and [fence.code for fence in read_fences(chinese, language)] == expected


def test_structure_is_equal():
    """The pages have the same headings, and the translation is one."""
    english, chinese = ((DOCS / page).read_text(encoding='utf-8') for page in ('quickstart.md', 'zh/quickstart.md'))
    headings = [re.findall(r'^#+ ', re.sub(r'```.*?```', '', text, flags=re.S), re.M) for text in (english, chinese)]
    assert headings[0] == headings[1]
    assert len(re.findall(r'[\u4e00-\u9fff]', chinese)) > 200
