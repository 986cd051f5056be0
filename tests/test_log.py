"What a wandb run holds: curves and named settings; no image, no patient, nothing about the machine"
import os, platform, subprocess, sys
from pathlib import Path

import pytest

from medprivacy.core import ConfigError
from medprivacy.data.phantom import tiny_records
from medprivacy.log import WandbImagesCallback, wandb_run
from medprivacy.obfuscate import train_obfuscator

PICTURES = (b'\x89PNG', b'\xff\xd8\xff', b'GIF8', b'IHDR')


def session(folder, images):
    "A training with logging, in a process of its own; prints the ids that must not be found"
    recs = tiny_records(20, root=Path(folder)/'p', size=32, attack=.5)
    with wandb_run(Path(folder)/'w', dict(lr=2e-3), images=images, records=recs if images else None) as cbs:
        train_obfuscator(recs, size=32, bs=8, epochs=2, archs=('small_resnet',), attacker_steps=1, device='cpu', cbs=cbs)
    print('\n'.join([*recs.df.patient_id.astype(str), *recs.df.image_id.astype(str), *recs.df.path.astype(str)]))


if __name__ == '__main__': session(sys.argv[1], sys.argv[2] == 'images'); sys.exit(0)


def run(tmp_path, images=''):
    env = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path/'elsewhere'), 'HOME': str(tmp_path/'home')}
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__, str(tmp_path), images], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-2000:]
    return set(out.stdout.split()), {p: p.read_bytes() for p in (tmp_path/'w').rglob('*') if p.is_file() and not p.is_symlink()}


def test_run_holds_no_image_and_no_patient(tmp_path):
    ids, files = run(tmp_path)
    records = b''.join(b for p, b in files.items() if p.suffix == '.wandb')
    assert b'train_loss' in records and b'disease_auroc' in records
    assert [i for i in ids if len(i) > 3 and any(i.encode() in b for b in files.values())] == []
    assert not any(m in b for b in files.values() for m in PICTURES) and not [p for p in files if p.suffix in ('.png', '.jpg', '.pt', '.pth', '.safetensors')]
    assert not [w for w in (platform.node(), 'model name', 'git@', 'github.com') if w.encode() in records]
    assert not (tmp_path/'wandb').exists()

def test_images_of_phantoms_when_asked(tmp_path):
    ids, files = run(tmp_path, 'images')
    assert [p for p in files if p.suffix == '.png'] and not [i for i in ids if len(i) > 3 and any(i.encode() in b for b in files.values())]

def test_images_of_patients_never(tmp_path):
    recs = tiny_records(12, root=tmp_path/'p', size=16)
    clinic = type(recs)(recs.df, recs.root, recs.labels, recs.task, 'clinic')
    moved  = type(recs)(recs.df, tmp_path, recs.labels, recs.task, recs.name)
    for o in (clinic, moved, None):
        with pytest.raises(ConfigError, match='phantoms only'): WandbImagesCallback(o)
        with pytest.raises(ConfigError, match='phantoms only'):
            with wandb_run(tmp_path/'w', images=True, records=o): pass
    assert not (tmp_path/'w').exists()

@pytest.mark.parametrize('value', [[1, 2], dict(a='P1'), object()])
def test_settings_are_single_values(value, tmp_path):
    with pytest.raises(ConfigError, match='could name patients'):
        with wandb_run(tmp_path/'w', dict(x=value)): pass
