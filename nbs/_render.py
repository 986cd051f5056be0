"""Render `README.md` and the docs site from the notebooks and their stored outputs, without Quarto

Usage: `python nbs/_render.py readme` or `python nbs/_render.py site [folder]`. nbdev does its part as for Quarto (hidden
cells, `show_doc` tables, links); nbconvert writes the README, smalldocs the site from the same `_quarto.yml`.
"""
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


def _local_math(page):
    "Turn TeX into MathML, which browsers draw themselves, instead of asking another host for a script"
    from html import unescape
    from latex2mathml.converter import convert
    def _one(m): return convert(unescape(m[2]).strip()[2:-2], display='block' if m[1]=='display' else 'inline')
    page = re.sub(r'<span class="math (inline|display)">(.*?)</span>', _one, page, flags=re.S)
    return re.sub(r'<(link|script)[^>]*/npm/katex@[^>]*>(</script>)?', '', page)


def render_site(
    out: Path = ROOT/'_docs',    # Where the site goes; replaced if it exists
    n_workers: int = 2,          # Processes that prepare notebooks
) -> Path:                       # `out`
    "Prepare the notebooks as nbdev does for Quarto, then render them with smalldocs"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    cache = ROOT/'_proc'
    for p in cache.glob('*.ipynb'):
        if not (NBS/p.name).exists(): p.unlink()
    cache = proc_nbs(NBS, n_workers=n_workers)
    shutil.rmtree(cache/'_docs', ignore_errors=True)
    for name in ('_quarto.yml', 'sidebar.yml', 'nbdev.yml', 'styles.css'): shutil.copy(NBS/name, cache/name)
    subprocess.run([Path(sys.executable).parent/'smalldocs', 'render', '--quiet', str(cache)], check=True)
    for p in (cache/'_docs').rglob('*.html'): p.write_text(_local_math(p.read_text(encoding='utf-8')), encoding='utf-8')
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(cache/'_docs', out)
    return out


if __name__=='__main__':
    what, *rest = sys.argv[1:] or ['']
    if what=='readme': (ROOT/'README.md').write_text(readme_text(), encoding='utf-8')
    elif what=='site': print(render_site(*map(Path, rest[:1]))/'index.html')
    else: raise SystemExit(__doc__)
