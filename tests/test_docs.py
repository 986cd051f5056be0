"The docs site, rendered from the stored outputs and opened page by page in Chromium"
import functools
import http.server
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
import yaml

ROOT  = Path(__file__).resolve().parent.parent
NBS   = ROOT/'nbs'
FLAGS = '''--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage --window-size=1300,1600'''.split()


class Page(HTMLParser):
    "Ids, links and images of one HTML page"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.images = {'top'},[],[]
        self.text = path.read_text(encoding='utf-8')
        self.feed(self.text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag=='a' and a.get('name'): self.ids.add(a['name'])
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if tag=='img': self.images.append(a.get('src', ''))
        if tag in ('link', 'script') and a.get('rel')!='canonical': self.links += [a[k] for k in ('href', 'src') if a.get(k)]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')/'site'
    done = subprocess.run([sys.executable, NBS/'_render.py', 'site', out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    return out


@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}


@pytest.fixture(scope='module')
def server(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{srv.server_port}'
    srv.shutdown(); srv.server_close()


@pytest.fixture(scope='module')
def browser():
    chromium, driver = shutil.which('chromium') or shutil.which('chromium-browser'), shutil.which('chromedriver')
    if not (chromium and driver): pytest.skip('chromium or chromedriver is not installed: the rendered site is not opened')
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    opts = webdriver.ChromeOptions()
    opts.binary_location = chromium
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for f in [*FLAGS, f'--user-data-dir={profile}']: opts.add_argument(f)
        opts.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        d = webdriver.Chrome(service=Service(driver), options=opts)
        yield d
        d.quit()


def page_of(nb): return re.sub(r'^\d+[a-z]*_', '', nb).replace('.ipynb', '.html')

def wait(d, cond, secs=20):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(d, secs).until(cond)


def test_sidebar_lists_every_notebook():
    spec = spec_from_file_location('_render', NBS/'_render.py')
    render = module_from_spec(spec); spec.loader.exec_module(render)
    assert (NBS/'sidebar.yml').read_text(encoding='utf-8')==render.sidebar_text(), 'run `make docs`'
    listed = [o for e in yaml.safe_load(render.sidebar_text())['website']['sidebar']['contents'] for o in ([e] if isinstance(e, str) else e['contents'])]
    assert sorted(listed)==sorted(p.name for p in NBS.glob('*.ipynb'))


def test_every_notebook_is_a_page(pages):
    assert set(pages) >= {page_of(p.name) for p in NBS.glob('*.ipynb')}


def test_links_and_images_resolve(site, pages):
    bad = []
    for name,page in pages.items():
        for link in page.links + page.images:
            if urlparse(link).scheme or link.startswith('//'):
                continue
            path, anchor = urldefrag(urljoin(name, link))
            path = unquote(path) or name
            if (site/path).is_dir(): path += '/index.html'
            if not (site/path).is_file(): bad.append((name, link, 'no such file'))
            elif anchor and path in pages and unquote(anchor) not in pages[path].ids: bad.append((name, link, 'no such anchor'))
    assert not bad


def test_pages_ask_nothing_of_other_hosts(pages):
    "Stylesheets, scripts and images are our own: the site reads the same without a network"
    hosts = [(n, l) for n,p in pages.items() for l in re.findall(r'<(?:link|script|img)\b[^>]*\b(?:href|src)="((?:https?:)?//[^"]+)"', p.text)
             if 'rel="canonical"' not in l]
    assert not hosts


def test_api_pages_show_docments(pages):
    text = re.sub(r'<[^>]+>', '', pages['data.split.html'].text)
    assert 'def split_patients' in text and re.search(r'fracs.*#', text), 'show_doc gives no commented signature'


def test_browser_opens_every_page(browser, server, pages):
    bad = []
    for name in pages:
        browser.get_log('browser')
        browser.get(f'{server}/{name}')
        wait(browser, lambda d: d.execute_script('return document.readyState')=='complete')
        broken = browser.execute_script('return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src.slice(0, 90))')
        severe = [l['message'] for l in browser.get_log('browser') if l['level']=='SEVERE']
        wide = browser.execute_script('return document.documentElement.scrollWidth - document.documentElement.clientWidth')
        bad += [(name, 'image', b) for b in broken] + [(name, 'console', s) for s in severe]
        if wide>2: bad.append((name, 'layout', f'{wide} px wider than the window'))
        if not browser.find_element('css selector', 'h1').text.strip(): bad.append((name, 'no title', ''))
    assert not bad


@pytest.mark.parametrize('query,page', [('split_patients', 'data.split.html'), ('seed_everything', 'core.html')])
def test_search_finds(browser, server, query, page):
    browser.get(f'{server}/index.html')
    box = next(o for o in browser.find_elements('css selector', '.smalldocs-search input') if o.is_displayed())
    box.send_keys(query)
    hits = wait(browser, lambda d: [o for o in d.find_elements('css selector', '.search-result') if o.is_displayed()])
    assert any(page in h.get_attribute('href') for h in hits)
    hits[0].click()
    wait(browser, lambda d: not d.current_url.endswith('index.html'))
    assert browser.find_element('css selector', 'h1').text.strip()
