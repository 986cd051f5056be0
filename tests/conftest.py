"Shared settings of all tests: a quiet, single-threaded, offline process, and the way to real images"
import os
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'
os.environ['WANDB_MODE'] = 'disabled'
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    "Skip tests marked `cuda` on machines without a CUDA device"
    if torch.cuda.is_available(): return
    skip = pytest.mark.skip(reason='no CUDA device')
    for item in items:
        if 'cuda' in item.keywords: item.add_marker(skip)


@pytest.fixture(scope='session')
def repo_root(): return ROOT


@pytest.fixture(scope='session')
def real_data():
    "Function: name of a data set -> its folder below `MEDPRIVACY_DATA`; skips the test where that is absent"
    base = Path(os.environ.get('MEDPRIVACY_DATA', ROOT.parent/'shared'/'data'))
    def _folder(name):
        if not (base/name).is_dir(): pytest.skip(f'no real images: {name!r} is not below MEDPRIVACY_DATA ({base})')
        return base/name
    return _folder


@pytest.fixture(autouse=True)
def close_figures():
    "Close what a test has drawn, so that figures do not pile up"
    yield
    import sys
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


@pytest.fixture(autouse=True)
def same_draws():
    "Start every test from the same random state, so that its outcome does not depend on what ran before it"
    import random
    import numpy as np
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
