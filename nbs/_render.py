"""Render `README.md` and the docs site from the notebooks and their stored outputs, without Quarto

Usage: `python nbs/_render.py readme` or `python nbs/_render.py site [folder]`. nbdev does its part as for Quarto (hidden
cells, signatures, links); nbconvert writes the README, smalldocs the site from the same `_quarto.yml`.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS  = ROOT/'nbs'


def readme_text() -> str:    # GitHub-flavoured Markdown
    "Convert `index.ipynb`: prose, code and text outputs; pictures must be files below `nbs/images`"
    from execnb.nbio import read_nb
    from nbconvert import MarkdownExporter
    from nbdev.process import extract_directives
    nb = read_nb(NBS/'index.ipynb')
    keep = []
    for c in nb.cells:
        flags = extract_directives(c, remove=True) if c.cell_type=='code' else {}
        if 'hide' in flags or flags.get('include:')==['false']: continue
        if c.cell_type=='code': c.source = re.sub(r'^#\s*\|.*\n?', '', c.source, flags=re.M)
        if flags.get('echo:')==['false'] or 'hide_input' in flags: c.source = ''
        c.outputs = [o for o in c.get('outputs', []) if o.output_type!='error']
        keep.append(c)
    nb.cells = keep
    exporter = MarkdownExporter(config={'NbConvertBase': {'display_data_priority': ['text/markdown', 'image/png', 'text/plain']}})
    body, res = exporter.from_notebook_node(_as_node(nb))
    if res['outputs']: raise SystemExit('index.ipynb stores a picture as output; save it below nbs/images and link it')
    body = re.sub(r'```python\n\s*```\n', '', body)                       # left of cells whose input is hidden
    body = re.sub(r'\]\((?!\w+:|#|/)([^)]+)\)', r'](nbs/\1)', body)       # links are relative to nbs/ in the notebook
    body = re.sub(r'\n{3,}', '\n\n', '\n'.join(l.rstrip() for l in body.splitlines())).strip()
    return f'<!-- Made from nbs/index.ipynb by `make README.md`; edit the notebook -->\n\n{body}\n'


def _as_node(nb):
    import nbformat
    from execnb.nbio import nb2str
    node = nbformat.reads(nb2str(nb), as_version=4)
    node.metadata.language_info = {'name': 'python'}
    return node


SECTIONS = [(0, 'Foundations'), (1, 'Data'), (10, 'Models and objectives'), (23, 'Obfuscation and attack'), (40, 'Private training'),
            (49, 'Evaluation and report'), (70, 'Commands'), (80, 'Tutorials')]


def sidebar_text() -> str:    # YAML for `nbs/sidebar.yml`
    "List every notebook in the order of its number, under the section that its number falls in"
    def _key(p): return (*re.match(r'(\d+)([a-z]*)_', p.name).groups(), p.name)
    res, last = ['# Made by nbs/_render.py from the numbers of the notebooks', 'website:', '  sidebar:', '    contents:', '      - index.ipynb'], None
    for p in sorted((p for p in NBS.glob('*.ipynb') if p.name[0].isdigit()), key=_key):
        sec = [name for start,name in SECTIONS if start<=int(_key(p)[0])][-1]
        if sec!=last: res += [f'      - section: {sec}', '        contents:']
        res, last = res + [f'          - {p.name}'], sec
    return '\n'.join(res) + '\n'


def _page_name(name): return re.sub(r'^\d+[a-z]*_', '', name)    # as nbdev names pages for Quarto: `01a_data.split` is `data.split.html`


def _lay_out(cache, src):
    "Copy what nbdev prepared in `cache` to `src`, under page names and with links to them"
    shutil.rmtree(src, ignore_errors=True); src.mkdir()
    for p in cache.rglob('*'):
        if p.is_dir() or src in p.parents: continue
        q = src/p.relative_to(cache).with_name(_page_name(p.name))
        q.parent.mkdir(parents=True, exist_ok=True)
        if p.suffix not in ('.ipynb', '.yml'): shutil.copy(p, q); continue
        s = p.read_text(encoding='utf-8')
        s = re.sub(r'(\]\(|- )(\d+[a-z]*_[\w.]+\.ipynb)', lambda m: m[1] + _page_name(m[2]), s)
        q.write_text(_sized(s) if p.suffix=='.ipynb' else s, encoding='utf-8')


def _sized(text):
    "Give pictures the width that Jupyter shows them at (half their pixels), and drop a page option that smalldocs does not know"
    nb = json.loads(re.sub(r'output-file: [\w.-]+\\n', '', text))
    for o in (o for c in nb['cells'] for o in c.get('outputs', [])):
        data, size = o.get('data', {}), o.get('metadata', {}).get('image/png', {})
        if 'image/png' in data and 'width' in size:
            png = ''.join(data.pop('image/png')).replace('\n', '')
            data['text/html'] = f'<img class="img-fluid" width="{size["width"]}" alt="figure" src="data:image/png;base64,{png}">'
    return json.dumps(nb)


def _finish(page, home):
    "MathML in place of a script from another host, links within the site in place of links to its public address, plain docments"
    from html import unescape
    from latex2mathml.converter import convert
    def _math(m): return convert(unescape(m[2]).strip()[2:-2], display='block' if m[1]=='display' else 'inline')
    page = re.sub(r'<span class="math (inline|display)">(.*?)</span>', _math, page, flags=re.S)
    page = re.sub(r'<(link|script)[^>]*/npm/katex@[^>]*>(</script>)?', '', page)
    page = re.sub(r'\[`([\w.]+)`\]\(https?://[^)\s]+\)', r'\1', page)
    return re.sub(rf'(<a\b[^>]*\bhref="){re.escape(home)}/', r'\1', page)


def render_site(
    out: Path = ROOT/'_docs',    # Where the site goes; replaced if it exists
    n_workers: int = 2,          # Processes that prepare notebooks
) -> Path:                       # `out`
    "Prepare the notebooks as nbdev does for Quarto, then render them with smalldocs"
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    (NBS/'sidebar.yml').write_text(sidebar_text(), encoding='utf-8')
    cfg, cache = get_config(), ROOT/'_proc'
    for p in cache.glob('*.ipynb'):
        if not (NBS/p.name).exists(): p.unlink()
    cache = proc_nbs(NBS, n_workers=n_workers)
    for p in [*NBS.glob('*.yml'), *NBS.glob('*.css')]: shutil.copy(p, cache/p.name)
    src = cache/'_site_src'
    _lay_out(cache, src)
    subprocess.run([Path(sys.executable).parent/'smalldocs', 'render', '--quiet', str(src)], check=True)
    made, out = src/cfg.doc_path.name, Path(out)
    for p in made.rglob('*.html'): p.write_text(_finish(p.read_text(encoding='utf-8'), cfg.doc_host + cfg.doc_baseurl), encoding='utf-8')
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(made, out)
    return out


if __name__=='__main__':
    what, *rest = sys.argv[1:] or ['']
    if what=='readme': (ROOT/'README.md').write_text(readme_text(), encoding='utf-8')
    elif what=='site': print(render_site(*map(Path, rest[:1]))/'index.html')
    else: raise SystemExit(__doc__)
