"""Every quirk of a data set has a test that fails when the branch for it is removed

`mutants/<set>.toml` lists the branches: `old` is what stands in `module`, `new` what it is replaced by, `test` the test that
must fail then. Each mutant is a copy of the package. One process per file loads the slow imports once and forks for each test.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILES = sorted((HERE/'mutants').glob('*.toml'))

def mutants(file): return tomllib.loads(file.read_text(encoding='utf-8'))['mutant']

def forked_pytest(folder, *tests):
    "Exit code of pytest on some tests, with the package in `folder`"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1); os.dup2(null, 2)
    os.chdir(folder); sys.path.insert(0, str(folder))
    code = 99
    try: code = int(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-c', str(ROOT/'pytest.ini'),
                                 '--rootdir', str(ROOT), *[str(ROOT/t) for t in tests]]))
    finally: os._exit(code)

def survivors(file):
    "Run all tests on the true package, which they must pass, and each on its mutant, which it must not"
    out = []
    with tempfile.TemporaryDirectory() as tmp:
        true, copy = Path(tmp)/'true', Path(tmp)/'mutant'
        shutil.copytree(ROOT/'medprivacy', true/'medprivacy'); shutil.copytree(ROOT/'medprivacy', copy/'medprivacy')
        if code := forked_pytest(true, *dict.fromkeys(m['test'] for m in mutants(file))):
            return [f'the tests end with {code} on the package itself']
        for m in mutants(file):
            source = (true/m['module']).read_text(encoding='utf-8')
            if source.count(m['old']) != 1: out.append(f"{m['quirk']}: {source.count(m['old'])} places hold the old text"); continue
            (copy/m['module']).write_text(source.replace(m['old'], m['new']), encoding='utf-8')
            code = forked_pytest(copy, m['test'])
            if code != 1: out.append(f"{m['quirk']}: {m['test']} ends with {code} on the mutant")
            (copy/m['module']).write_text(source, encoding='utf-8')
    return out

@pytest.mark.parametrize('file', FILES, ids=[f.stem for f in FILES])
def test_mutants_are_well_formed(file):
    for m in mutants(file):
        assert set(m) == {'quirk', 'module', 'old', 'new', 'test'} and m['old'] != m['new']
        assert (ROOT/m['module']).read_text(encoding='utf-8').count(m['old']) == 1, m['quirk']
        name = m['test'].partition('::')[2].partition('[')[0]
        assert f'def {name}(' in (ROOT/m['test'].partition('::')[0]).read_text(encoding='utf-8'), m['test']

@pytest.mark.slow
@pytest.mark.parametrize('file', FILES, ids=[f.stem for f in FILES])
def test_no_mutant_survives(file):
    r = subprocess.run([sys.executable, __file__, str(file)], capture_output=True, text=True, cwd=tempfile.gettempdir(),
                       env=os.environ | {'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'})    # plugins were imported before pytest could rewrite them
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout.splitlines()[-1]) == []

if __name__ == '__main__':
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import fastai.vision.all    # noqa: F401  loaded once, before forking
    print(json.dumps(survivors(Path(sys.argv[1]))))
