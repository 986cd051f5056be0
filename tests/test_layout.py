"""The house style as tests: limits of the notebooks, direction of imports, docments, clean outputs, shape of the repository

Everything is read from the notebooks and from the exported modules; nothing is run. A failure names the notebook and the cell.
"""
import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
NBS  = ROOT/'nbs'
LIB  = 'medprivacy'

MAX_CELLS, MAX_LINES, MAX_KB, MAX_CELL_LINES, MAX_COLS = 70, 300, 500, 60, 120
TOP_LEVEL = set('''.ci .gitattributes .gitignore CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE Makefile README.md
    medprivacy nbs pyproject.toml pytest.ini settings.ini setup.py tests'''.split())
NB_NAME   = re.compile(r'^(\d\d)([a-z]?)_([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)?)\.ipynb$')
ABSOLUTE  = re.compile(r'''(?<![\w.:/~-])(/(?:home|root|Users|work|workspace|mnt|media|tmp|private|var/folders|data\d*)/[\w.-]+|[A-Z]:\\\w+)''')
REAL_DATA = re.compile(r'MEDPRIVACY_DATA|shared/data|nih-sample|odir-fundus|covid-cxr')


class Cell:
    "One notebook cell: its number, source, directives, and code without directives"
    def __init__(self, i, d):
        self.i,self.kind = i,d['cell_type']
        self.src,self.outputs,self.raw = ''.join(d['source']),d.get('outputs', []),d
        lines = self.src.splitlines()
        self.flags = [re.sub(r'^#\s*\|\s*', '', l).strip() for l in lines if re.match(r'#\s*\|', l)] if self.kind=='code' else []
        self.code  = '\n'.join(l for l in lines if not re.match(r'#\s*\|', l))
        self.is_export = any(re.match(r'export', f) for f in self.flags)
        self.n_lines   = sum(bool(l.strip()) for l in self.code.splitlines())

    @property
    def tree(self):
        code = '\n'.join(l for l in self.code.splitlines() if not re.match(r'\s*[%!]', l))
        return ast.parse(code) if self.kind=='code' else ast.parse('')


class Notebook:
    "A notebook with its place on the map: `key` is (number, letter), `module` the dotted name it exports to"
    def __init__(self, path):
        self.path,self.name = path,path.name
        self.cells = [Cell(i, c) for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells'])]
        self.code  = [c for c in self.cells if c.kind=='code']
        self.md    = [c for c in self.cells if c.kind=='markdown']
        self.exported = [c for c in self.code if c.is_export]
        exp = [f.split()[1] for c in self.code for f in c.flags if f.startswith('default_exp')]
        self.module = exp[0] if exp else None
        m = NB_NAME.match(self.name)
        self.key = (int(m[1]), m[2]) if m else (-1, '')


@cache
def notebooks(): return [Notebook(p) for p in sorted(NBS.rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(NBS).parts)]
@cache
def exporting(): return [n for n in notebooks() if n.module]

def each(nbs): return pytest.mark.parametrize('nb', nbs, ids=[n.name for n in nbs])
def where(nb, cells, why): return [f'{nb.name} cell {c.i}: {why(c)}' for c in cells]
def is_import(o): return isinstance(o, (ast.Import, ast.ImportFrom))
def tracked(*pats):
    "Files that git tracks or would track"
    if not (ROOT/'.git').exists(): pytest.skip('not a git checkout: which files belong to the project is unknown')
    out = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', '--', *pats], cwd=ROOT, capture_output=True, check=True)
    return [ROOT/p for p in out.stdout.decode().split('\0') if p and (ROOT/p).is_file()]


# ---------------------------------------------------------------- names and anatomy

@each([n for n in notebooks() if n.name!='index.ipynb'])
def test_name_and_place(nb):
    assert NB_NAME.match(nb.name), 'a notebook is NN_module.ipynb, NNa_module.ipynb or index.ipynb'
    if nb.module: assert nb.module==NB_NAME.match(nb.name)[3], 'default_exp and file name say different modules'
    assert 'util' not in nb.name, 'no utils notebook: a helper lives where it is first needed'


def test_a_name_is_a_module_or_a_package():
    mods = {n.module for n in exporting()}
    assert not [m for m in mods if any(o.startswith(m + '.') for o in mods)]
    assert [m for m,k in Counter(n.module for n in exporting()).items() if k>1]==[]


@each(notebooks())
def test_title_first(nb):
    c = nb.cells[0]
    assert c.kind=='markdown' and re.match(r'# \S.*\n+> [^\n]+\s*$', c.src), 'first cell: `# Title` and `> one line`'


@each(exporting())
def test_anatomy(nb):
    assert nb.cells[1].flags==[f'default_exp {nb.module}'] and not nb.cells[1].code.strip(), 'second cell: default_exp alone'
    last = nb.cells[-1]
    assert last.flags==['hide'] and last.code.split()==['import', 'nbdev;', 'nbdev.nbdev_export()'], 'last cell: hidden nbdev_export'
    assert any(re.match(r'##\s+Sharp edges', c.src) for c in nb.md), 'a section `## Sharp edges` is missing'
    defs = [c for c in nb.exported if not all(map(is_import, c.tree.body))]
    assert len(nb.md) >= .6*len(defs), f'{len(nb.md)} markdown cells for {len(defs)} exported ones'
    flagged = [c for c in nb.exported if any(not f.startswith(('export', 'echo', 'code-fold')) for f in c.flags)]
    assert not where(nb, flagged, lambda c: f'an exported cell carries {c.flags}')


@each(exporting())
def test_limits(nb):
    kb, lines = nb.path.stat().st_size/1024, sum(c.n_lines for c in nb.exported)
    assert len(nb.cells)<=MAX_CELLS and lines<=MAX_LINES and kb<=MAX_KB, f'{len(nb.cells)} cells, {lines} exported lines, {kb:.0f} KB'
    assert not where(nb, [c for c in nb.exported if c.n_lines>MAX_CELL_LINES], lambda c: f'{c.n_lines} lines')


@each(notebooks())
def test_line_length(nb):
    long = [(c, l) for c in nb.code for l in c.src.splitlines() if len(l)>MAX_COLS]
    assert not [f'{nb.name} cell {c.i} ({len(l)}): {l[:60]}…' for c,l in long]


def test_exported_cells_are_small():
    sizes = sorted(c.n_lines for n in exporting() for c in n.exported)
    if len(sizes)<20: pytest.skip('too few exported cells for a median')
    assert sizes[len(sizes)//2]<=18 and sizes[int(.9*len(sizes))]<=35, f'median {sizes[len(sizes)//2]}, p90 {sizes[int(.9*len(sizes))]}'


# ---------------------------------------------------------------- imports

@each(exporting())
def test_import_cells(nb):
    mixed = [c for c in nb.exported if 0 < sum(is_import(o) for o in c.tree.body) < len(c.tree.body)]
    assert not where(nb, mixed, lambda c: 'imports and other code in one exported cell')
    pure = [c for c in nb.exported if c.tree.body and all(map(is_import, c.tree.body))]
    assert len(pure)<=1, f'import cells {[c.i for c in pure]}: one is enough'
    # nbdev runs every cell with an import when it renders the docs, and nothing else: such a cell must stand alone
    run = [c for c in nb.code if not c.is_export and 'eval: false' not in c.flags and c is not nb.cells[-1]]
    tied = [c for c in run if any(map(is_import, ast.walk(c.tree))) and not all(map(is_import, c.tree.body))]
    assert not where(nb, tied, lambda c: 'an import beside other code: give the import a cell of its own')
    star = [c for c in nb.exported for o in ast.walk(c.tree) if isinstance(o, ast.ImportFrom) and any(a.name=='*' for a in o.names)]
    assert not where(nb, star, lambda c: 'star import in an exported cell')


def own_imports(nb):
    "Pairs (cell, dotted name below the package) of every import of our own modules in exported cells, nested ones included"
    for c in nb.exported:
        for o in ast.walk(c.tree):
            if isinstance(o, ast.Import):
                yield from ((c, a.name[len(LIB)+1:]) for a in o.names if a.name.split('.')[0]==LIB)
            elif isinstance(o, ast.ImportFrom):
                if o.level: yield c, None
                elif o.module.split('.')[0]==LIB:
                    base = o.module[len(LIB)+1:]
                    yield from ((c, f'{base}.{a.name}'.strip('.')) for a in o.names)


@each(exporting())
def test_imports_point_down(nb):
    keys, bad = {n.module: n.key for n in exporting()}, []
    for c,name in own_imports(nb):
        mod = None if name is None else next((m for m in (name, name.rpartition('.')[0]) if m in keys), None)
        if name is None: bad.append((c, 'write `from medprivacy.x import y`, not a relative import'))
        elif mod is None: bad.append((c, f'{name} comes from no notebook'))
        elif keys[mod]>=nb.key: bad.append((c, f'{mod} is not below {nb.name}'))
    assert not [f'{nb.name} cell {c.i}: {w}' for c,w in bad]


# ---------------------------------------------------------------- public functions

def public(mod):
    "Public functions and classes that `mod` itself defines, as (name, object)"
    for name in getattr(mod, '__all__', []):
        o = getattr(mod, name)
        if not name.startswith('_') and getattr(o, '__module__', None)==mod.__name__ and (inspect.isclass(o) or callable(o)): yield name,o

def undocumented(name, f, returns=True):
    "What is missing on the signature of `f`: docments and types, on each own argument and on the return"
    f = inspect.unwrap(f)
    own = ast.parse(inspect.cleandoc('\n' + inspect.getsource(f))).body[0].args
    given = [a for a in own.posonlyargs + own.args + own.kwonlyargs if a.arg not in ('self', 'cls')]
    doc = docments(f, full=True)
    miss = [f'{name}({a.arg}): no docment' for a in given if not (doc.get(a.arg) or {}).get('docment')]
    miss += [f'{name}({a.arg}): no type' for a in given if a.annotation is None]
    if returns and f.__annotations__.get('return') not in (None, 'None') and not doc['return']['docment']: miss.append(f'{name}: no docment on the return')
    if returns and 'return' not in f.__annotations__: miss.append(f'{name}: no type on the return')
    return miss

def patched(mod, nb):
    "Functions added to a class with `@patch`, as (name, function)"
    for c in nb.exported:
        for o in c.tree.body:
            if isinstance(o, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in o.decorator_list) and not o.name.startswith('_'):
                cls = eval(ast.unparse(o.args.args[0].annotation), vars(mod))
                f = inspect.getattr_static(cls, o.name)
                yield f'{cls.__name__}.{o.name}', getattr(f, 'fget', None) or getattr(f, '__func__', f)


@each(exporting())
def test_docments(nb):
    mod, miss = importlib.import_module(f'{LIB}.{nb.module}'), []
    for name,o in public(mod):
        if not (inspect.getdoc(o) or '').strip(): miss.append(f'{name}: no docstring')
        if inspect.isclass(o):
            if '__init__' in vars(o) and not hasattr(o, '__dataclass_fields__'): miss += undocumented(name, o.__init__, returns=False)
            if hasattr(o, '__dataclass_fields__'):
                doc = docments(o, full=True)
                miss += [f'{name}.{k}: no docment' for k in vars(o).get('__annotations__', {}) if not (doc.get(k) or {}).get('docment')]
        elif inspect.isfunction(inspect.unwrap(o)): miss += undocumented(name, o)
    for name,f in patched(mod, nb):
        if not (inspect.getdoc(f) or '').strip(): miss.append(f'{name}: no docstring')
        miss += undocumented(name, f)
    assert not miss


@each(exporting())
def test_assertions(nb):
    def _n(t): return sum(isinstance(o, ast.Assert) or
                          isinstance(o, ast.Call) and re.match(r'test_|ExceptionExpected$', ast.unparse(o.func).split('.')[-1]) is not None
                          for o in ast.walk(t))
    n = sum(_n(c.tree) for c in nb.code if not c.is_export)
    need = sum(not all(map(is_import, c.tree.body)) for c in nb.exported)
    assert n>=need, f'{n} assertions for {need} exported cells'
    bad = [c for c in nb.exported if any(isinstance(o, ast.Assert) for o in ast.walk(c.tree))]
    assert not where(nb, bad, lambda c: '`assert` vanishes under -O: raise one of our errors')
    bare = [c for c in nb.exported if any(isinstance(o, ast.ExceptHandler) and o.type is None for o in ast.walk(c.tree))]
    assert not where(nb, bare, lambda c: 'bare except')


# ---------------------------------------------------------------- nothing private, nothing twice, nothing dirty

def test_no_absolute_paths():
    files = tracked('*.py', '*.ipynb', '*.md', '*.ini', '*.toml', '*.cfg', '*.cff', '*.yml', '*.css', 'Makefile', '.ci/*')
    hits = [(p.relative_to(ROOT), m[0]) for p in files if p!=Path(__file__) for m in ABSOLUTE.finditer(text_of(p))]
    assert not hits

def text_of(p):
    "The text of a file; of a notebook its sources and text outputs, without embedded images"
    if p.suffix!='.ipynb': return p.read_text(encoding='utf-8')
    return '\n'.join(c.src + '\n' + output_text(c) for c in Notebook(p).cells)

def output_text(c):
    "All text of the stored outputs of a cell"
    res = []
    for o in c.outputs:
        res += [''.join(o.get('text', ''))] + [''.join(v) for k,v in o.get('data', {}).items() if k.startswith('text/')]
    return '\n'.join(res)


@each(notebooks())
def test_clean_outputs(nb):
    bad = []
    for c in nb.code:
        if any(o['output_type']=='error' for o in c.outputs): bad.append((c, 'a stored error'))
        if any(o.get('name')=='stderr' for o in c.outputs): bad.append((c, 'something written to stderr: a warning?'))
        if c.raw.get('execution_count') is not None or c.raw.get('metadata'): bad.append((c, 'run nbdev_clean'))
        if REAL_DATA.search(c.src + output_text(c)): bad.append((c, 'real images are read or named: examples use phantoms'))
        if re.search(r'^\s*(!|%cd|%pip|%conda)', c.code, re.M): bad.append((c, 'a shell command, %cd or an install'))
        if re.search(r'untar_data\(|urlretrieve\(|requests\.get\(', c.code): bad.append((c, 'downloads'))
    assert not [f'{nb.name} cell {c.i}: {w}' for c,w in bad]


@each(exporting())
def test_has_visible_outputs(nb): assert any(c.outputs for c in nb.code), 'run the notebook: no output is stored'


def test_no_duplicate_cells():
    seen, twice = {}, []
    for n in notebooks():
        for c in n.code:
            if c.n_lines<4 or all(map(is_import, c.tree.body)): continue
            key = re.sub(r'\s+', ' ', c.code).strip()
            if key in seen: twice.append(f'{n.name} cell {c.i} = {seen[key]}')
            seen.setdefault(key, f'{n.name} cell {c.i}')
    assert not twice


def test_no_copied_blocks(n=10):
    "No run of ten exported lines stands in two notebooks: the shared part moves down the map"
    seen, twice = {}, set()
    for nb in exporting():
        lines = [l.strip() for c in nb.exported if not all(map(is_import, c.tree.body)) for l in c.code.splitlines() if l.strip()]
        for i in range(len(lines)-n+1):
            k = tuple(lines[i:i+n])
            if seen.setdefault(k, nb.name)!=nb.name: twice.add((nb.name, seen[k], k[0]))
    assert not twice


# ---------------------------------------------------------------- repository

def test_top_level():
    have = {p.relative_to(ROOT).parts[0] for p in tracked()}
    assert not have-TOP_LEVEL, 'unexpected at the top level: it is small on purpose'
    assert not TOP_LEVEL-have, 'missing at the top level'


def test_export_and_clean_change_nothing(tmp_path):
    "In a copy of the sources: what is stored is what `nbdev_export` and `nbdev_clean` would write"
    for name in ('nbs', LIB): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path/name)
    for cmd in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).with_name(cmd)], cwd=tmp_path, check=True, capture_output=True)
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.is_file() and p.suffix in ('.py', '.ipynb', '.toml')}
    diff = [str(p) for p in sorted(made) if not (ROOT/p).exists() or (ROOT/p).read_bytes()!=(tmp_path/p).read_bytes()]
    assert not diff, 'run `nbdev_export` and `nbdev_clean`, then commit'


def test_every_module_has_its_notebook():
    mods = {p.relative_to(ROOT/LIB).with_suffix('').as_posix().replace('/', '.') for p in (ROOT/LIB).rglob('*.py') if p.stem not in ('__init__', '_modidx')}
    assert mods=={n.module for n in exporting()}


def test_tests_mirror_modules():
    mods, names = {n.module for n in exporting()}, []
    for p in (ROOT/'tests').rglob('test_*.py'):
        rel = p.relative_to(ROOT/'tests')
        names.append(p.name)
        if len(rel.parts)>1: assert rel.parts[0] in {m.split('.')[0] for m in mods}, f'{rel}: no such package'
    assert [k for k,v in Counter(names).items() if v>1]==[], 'test files need unique names'
    assert not list((ROOT/'tests').rglob('__init__.py'))


def test_readme_is_the_index():
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location('_render', NBS/'_render.py')
    site = module_from_spec(spec); spec.loader.exec_module(site)
    assert (ROOT/'README.md').read_text(encoding='utf-8')==site.readme_text(), 'run `make README.md`'


def test_changelog_has_privacy_heading(): assert re.search(r'^### Privacy$', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
