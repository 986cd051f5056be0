"The page: everything escaped, nothing loaded, readable without seeing"
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from fastcore.xml import P, to_xml
from matplotlib import pyplot as plt

from medprivacy.core import DataError
from medprivacy.page import CSS, bullets, embed_figure, html_page, html_table, section

VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}


class Balanced(HTMLParser):
    "Fail on a tag that is not closed, or closed twice"
    def __init__(self, text):
        super().__init__(); self.open = []; self.feed(text); self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs):
        if tag not in VOID: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


@pytest.fixture
def png(tmp_path):
    fig, ax = plt.subplots(figsize=(2,1)); ax.plot([0,1]); fig.savefig(tmp_path/'a.png', dpi=150)
    return tmp_path/'a.png'

EVIL = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onload='x", '&amp;', '</table>', 'a\u202eb']

@pytest.mark.parametrize('evil', EVIL)
def test_every_text_is_escaped(evil, png):
    df = pd.DataFrame({evil: [evil], 'v': [.5]})
    parts = {evil: section('a', evil, html_table(df, evil), bullets([evil]), embed_figure(png, evil), P(evil))}
    page = html_page(evil, [evil], evil, parts, evil)
    Balanced(page)
    assert '<script' not in page and not re.search(r'<img (?!src="data:)', page)
    class Safe(HTMLParser):
        def handle_starttag(self, tag, attrs): assert not [k for k,_ in attrs if k.startswith('on')]
    Safe().feed(page)

def test_page_is_self_contained(png):
    page = html_page('t', [], 'b', {'A': section('a', 'A', embed_figure(png, 'x'))}, 'f')
    assert not re.search(r'https?:|//|@import|url\(', re.sub(r'base64,[A-Za-z0-9+/=]+', '', page))
    assert "default-src 'none'" in page.replace('&#39;', "'") and '<html lang="en">' in page and '<title>t</title>' in page

def test_tables_have_headers_and_captions():
    html = to_xml(html_table(pd.DataFrame(dict(name=['a', 'b'], n_patients=[3, 4])), 'What it shows'), indent=False)
    assert html.count('scope="col"') == 2 and html.count('scope="row"') == 2 and '<caption>What it shows</caption>' in html
    assert '>patients</th>' in html

@pytest.mark.parametrize('v,text', [(np.nan, '–'), (None, '–'), (.12345, '0.123'), (240., '240'), (1., '1.000'), (0., '0.000'), (np.int64(3), '3'),
                                    (True, 'yes'), (np.inf, 'inf'), (-2., '-2'), (1e-5, '1e-05'), (pd.NA, '–')])
def test_cells(v, text):
    df = pd.DataFrame({'a': ['x'], 'b': pd.Series([v], dtype=object)})
    assert f'<td>{text}</td>' in to_xml(html_table(df, 'c'), indent=False)

def test_unreadable_figure(tmp_path):
    (tmp_path/'a.png').write_bytes(b'no')
    with pytest.raises(DataError, match='a.png'): embed_figure(tmp_path/'a.png', 'x')

def test_style_has_balanced_braces_and_prints(): assert CSS.count('{') == CSS.count('}') and '@media print' in CSS
def test_left_out_parts_leave_no_trace(): assert 'None' not in to_xml(section('a', 'A', None, P('x'), None))
