"""Damage, kind by kind: each is a `DataError` that names the file or the column, what is wrong, and what to do; never a silent zero

`IMAGES` write one bad file, `TABLES` spoil one good table. A kind that is read all the same fails its test.
"""
import hashlib
import os
import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medprivacy.core import ConfigError, DataError, MedPrivacyError
from medprivacy.data.core import Records, read_table
from medprivacy.data.decode import check_sums, inside, kind_of, load_image, open_image
from medprivacy.data.dicom import write_dicom
from medprivacy.data.load import records_dls

GREY = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


# ---------------------------------------------------------------- makers

def encoded(im, fmt, **kw):
    f = BytesIO(); (Image.fromarray(im) if isinstance(im, np.ndarray) else im).save(f, fmt, **kw); return f.getvalue()

def blank(mode, fmt, **kw): return encoded(Image.new(mode, (16, 16)), fmt, **kw)

def png(w, h, bits, colour, raw, *more):
    "A PNG written byte by byte; `more` are chunks (name, bytes) before the pixels"
    def chunk(k, b): return struct.pack('>I', len(b)) + k + b + struct.pack('>I', zlib.crc32(k + b))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0)) + b''.join(chunk(*m) for m in more) +
            chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b''))

def two(mode='L'): return dict(save_all=True, append_images=[Image.new(mode, (16, 16), 200)])
def see_through():
    im = Image.new('RGBA', (16, 16), (9, 9, 9, 255)); im.putpixel((3, 3), (9, 9, 9, 0)); return encoded(im, 'PNG')
def palette():
    im = Image.new('P', (16, 16)); im.putpalette([0, 0, 0, 255, 0, 0]); return encoded(im, 'PNG', transparency=0)
def turned(k):
    e = Image.Exif(); e[0x0112] = k; return encoded(GREY, 'JPEG', exif=e)
def dcm(d, **kw): return write_dicom(d/'made.dcm', np.arange(1024, dtype=np.uint16).reshape(32, 32), **kw).read_bytes()
def changed(b, i, new): return b[:i] + new + b[i+len(new):]

JPG, PNG = encoded(GREY, 'JPEG'), encoded(GREY, 'PNG')

# kind → (content or function of the folder, what the error says)
IMAGES = {
    'JPEG cut in its pixels':       (JPG[:len(JPG)//2], 'truncated'),
    'JPEG cut at the last byte':    (JPG[:-1], 'truncated'),
    'JPEG cut in its header':       (JPG[:100], 'damaged|[Tt]runcated'),
    'JPEG with a broken marker':    (changed(JPG, JPG.index(b'\xff\xc0'), b'\xff\x01'), 'cannot be read'),
    'PNG cut in its pixels':        (PNG[:len(PNG)//2], 'cut short'),
    'PNG without its end mark':     (PNG[:-12], 'cut short'),
    'PNG cut at the last byte':     (PNG[:-1], 'cut short'),
    'PNG with a changed byte':      (changed(PNG, 2000, b'!!'), 'cannot be read'),
    'PNG cut in its header':        (PNG[:20], 'cut short'),
    'zero bytes':                   (b'', 'empty'),
    'text named .png':              (b'no image here', 'is a text'),
    'pointer of git-lfs':           (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'is a text'),
    'HTML error page':              (b'\n<!DOCTYPE html><html><h1>403 Forbidden</h1>', 'web page'),
    'XML error':                    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'web page'),
    'PDF':                          (b'%PDF-1.7 \x00', 'PDF'),
    'zip archive':                  (b'PK\x03\x04\x00\x00', 'zip archive'),
    'gzip archive':                 (b'\x1f\x8b\x08\x00', 'gzip archive'),
    'noise':                        (bytes(range(200, 256))*9, 'no mark'),
    'zeros (a hole in the disk)':   (bytes(5000), 'no mark'),
    '16-bit PNG where 8 declared':  (encoded(GREY.astype(np.uint16)*256, 'PNG'), 'bits=16'),
    '16-bit TIFF where 8 declared': (encoded(GREY.astype(np.uint16)*256, 'TIFF'), 'bits=16'),
    '16 bits in colour':            (png(4, 4, 16, 2, (b'\0' + bytes(24))*4), 'half of them'),
    '16 bits with transparency':    (png(4, 4, 16, 0, (b'\0' + bytes(8))*4, (b'tRNS', b'\0\0')), 'transparent|bits=16'),
    'CMYK':                         (blank('CMYK', 'JPEG'), 'CMYK'),
    'float TIFF':                   (blank('F', 'TIFF'), 'mode F'),
    '32-bit TIFF':                  (blank('I', 'TIFF'), 'mode I'),
    'LAB TIFF':                     (blank('LAB', 'TIFF'), 'mode LAB'),
    'animated GIF':                 (blank('L', 'GIF', **two()), 'GIF'),
    'animated PNG':                 (blank('L', 'PNG', **two()), '2 frames'),
    'TIFF of two pages':            (blank('L', 'TIFF', **two()), '2 frames'),
    'JPEG of two pictures':         (blank('RGB', 'MPO', **two('RGB')), '2 frames'),
    'WebP':                         (blank('RGB', 'WEBP'), 'WebP'),
    'decompression bomb':           (png(60000, 60000, 8, 0, b'\0'), 'bomb'),
    'bomb below twice the limit':   (png(10000, 10000, 8, 0, b'\0'), 'bomb'),
    'no width':                     (png(0, 4, 8, 0, b''), 'no pixels'),
    'no height':                    (png(4, 0, 8, 0, b''), 'no pixels'),
    'one pixel':                    (png(1, 1, 8, 0, b'\0\0'), 'placeholder'),
    'one row':                      (png(40, 1, 8, 0, bytes(41)), 'placeholder'),
    'transparent':                  (see_through(), 'transparent'),
    'palette with transparency':    (palette(), 'transparent'),
    'EXIF orientation of 9':        (turned(9), 'orientation'),
    'DICOM cut in its pixels':      (lambda d: dcm(d)[:-100], 'cannot be decoded'),
    'DICOM cut in its header':      (lambda d: dcm(d)[:300], 'no pixels|damaged|lacks'),
    'DICOM without pixels':         (lambda d: dcm(d)[:dcm(d).index(b'\xe0\x7f\x10\x00')], 'no pixels'),
    'DICOM of unknown coding':      (lambda d: dcm(d).replace(b'1.2.840.10008.1.2.1\0', b'1.2.3.4.5.6.7.8.9.9\0'), 'transfer syntax'),
    'DICOM of several frames':      (lambda d: write_dicom(d/'f.dcm', np.zeros((2, 8, 8), np.uint16)).read_bytes(), '2 frames'),
    'DICOM of one pixel':           (lambda d: write_dicom(d/'f.dcm', np.zeros((1, 1), np.uint16)).read_bytes(), 'no image'),
}


def folder(f): f.mkdir()
def dangling(f): f.symlink_to(f.parent/'nowhere.png')
def loop(f): f.symlink_to(f)
def pipe(f): os.mkfifo(f)
def nothing(f): pass

PLACES = {'folder': (folder, 'is a folder'), 'link to nothing': (dangling, 'link to a file that does not exist'), 'link to itself': (loop, 'cannot be read'),
          'pipe': (pipe, 'no regular file'), 'no file': (nothing, 'does not exist')}


# ---------------------------------------------------------------- images

def write(d, kind, name='bad.png'):
    body = IMAGES[kind][0]; (d/name).write_bytes(body(d) if callable(body) else body); return d/name


@pytest.mark.parametrize('kind', IMAGES)
def test_image(tmp_path, kind):
    "At any size, in colour and grey, with and without draft decoding"
    f = write(tmp_path, kind)
    for size, channels, draft in [(16, None, True), (8, 1, False), (64, 3, True)]:
        with pytest.raises(DataError, match=IMAGES[kind][1]) as e: load_image(f, size, channels, draft=draft)
        said = str(e.value)
        assert 'bad.png' in said and len(said) < 500 and (';' in said or ':' in said), 'no remedy'


@pytest.mark.parametrize('kind', PLACES)
def test_place(tmp_path, kind):
    f = tmp_path/'bad.png'; PLACES[kind][0](f)
    with pytest.raises(DataError, match=f'bad.png.*{PLACES[kind][1]}'): load_image(f, 16)


@pytest.mark.parametrize('kind', [k for k in IMAGES if '16' not in k])
@pytest.mark.parametrize('bits', [16, None])
def test_image_whatever_bits_are_declared(tmp_path, kind, bits):
    with pytest.raises(DataError, match='bad.png'): load_image(write(tmp_path, kind), 16, bits=bits)


@pytest.mark.parametrize('kind', [*IMAGES, *PLACES])
def test_loaders_refuse(tmp_path, kind):
    "Through the table and the loaders: found before there are loaders, whatever split the file is in"
    r = good(tmp_path); f = tmp_path/'i5.png'; f.unlink()
    if kind in IMAGES: write(tmp_path, kind, 'i5.png')
    else: PLACES[kind][0](f)
    with pytest.raises(DataError, match='i5.png'): records_dls(r, 'sex', 8, 1, device='cpu')


def test_no_permission(tmp_path):
    f = tmp_path/'bad.png'; f.write_bytes(PNG); f.chmod(0)
    me = os.geteuid()
    try:
        if me == 0: os.seteuid(65534)
        with pytest.raises(DataError, match='bad.png.*permission denied'): load_image(f, 16)
    finally:
        if me == 0: os.seteuid(0)


def test_file_that_is_too_large(tmp_path):
    "A sparse file of 3 GB is not read into memory"
    f = tmp_path/'bad.png'
    with f.open('wb') as o: o.write(PNG); o.truncate(3*2**30)
    with pytest.raises(DataError, match='bad.png.*3 GB'): load_image(f, 16)


@pytest.mark.parametrize('suffix,body,kind', [('.jpg', PNG, 'PNG'), ('.png', JPG, 'JPEG'), ('.dcm', PNG, 'PNG'), ('.png', None, 'DICOM')])
def test_wrong_suffix_is_read_and_told_once(tmp_path, capsys, monkeypatch, suffix, body, kind):
    import medprivacy.data.decode as decode
    monkeypatch.setattr(decode, '_TOLD', set())
    for k in 'ab': (tmp_path/f'{k}{suffix}').write_bytes(dcm(tmp_path) if body is None else body)
    a, b = (load_image(tmp_path/f'{k}{suffix}', 32) for k in 'ab')
    assert np.array_equal(a, b) and a.std() > 5
    out = capsys.readouterr().out
    assert f'a{suffix} is a {kind}' in out and 'b.' not in out.replace('.', '. ').split() and out.count('\n') == 1


def test_unnamed_suffix_is_no_fault(tmp_path, capsys):
    (tmp_path/'a').write_bytes(PNG); load_image(tmp_path/'a', 32); assert capsys.readouterr().out == ''


def test_dicom_suffix_without_the_mark(tmp_path):
    (tmp_path/'a.dcm').write_bytes(bytes(range(256))*4)
    with pytest.raises(DataError, match='a.dcm.*DICM'): load_image(tmp_path/'a.dcm', 8)


def test_every_cut_of_a_file_is_refused(tmp_path):
    "A PNG, a JPEG, a progressive JPEG and a DICOM, cut at 60 places each"
    r = np.random.default_rng(0)
    for name, body in {'a.png': PNG, 'a.jpg': JPG, 'p.jpg': encoded(GREY, 'JPEG', progressive=True), 'a.dcm': dcm(tmp_path)}.items():
        for n in sorted({0, 1, 2, 8, 131, 132, len(body)-1, len(body)-2, *r.integers(0, len(body), 60).tolist()}):
            (tmp_path/name).write_bytes(body[:n])
            for size in (8, 64):
                with pytest.raises(DataError, match=name): load_image(tmp_path/name, size)


def test_every_changed_byte_of_a_png_is_refused_or_harmless(tmp_path):
    "Checksums: whatever is still read gives the same pixels"
    right, r, refused = load_image_bytes(tmp_path, PNG), np.random.default_rng(1), 0
    for i in r.integers(8, len(PNG), 200):
        b = changed(PNG, int(i), bytes([PNG[i] ^ int(r.integers(1, 256))]))
        try: assert np.array_equal(load_image_bytes(tmp_path, b), right), i
        except DataError: refused += 1
    assert refused > 180


def load_image_bytes(d, b): (d/'x.png').write_bytes(b); return load_image(d/'x.png', 64)


def test_wrong_bytes_inside_a_jpeg_never_raise_anything_else(tmp_path):
    "They are mostly not found (the notebook says how often); what is found is a DataError"
    big, r, found = encoded(np.kron(GREY, np.ones((2, 2), np.uint8)), 'JPEG'), np.random.default_rng(0), 0
    for _ in range(200):
        i, n = r.integers(2, len(big)), r.integers(1, 30)
        (tmp_path/'a.jpg').write_bytes(changed(big, int(i), r.integers(0, 256, min(n, len(big)-i), np.uint8).tobytes()))
        try: assert load_image(tmp_path/'a.jpg', 32, 1).shape == (1, 32, 32)
        except DataError as e: found += 1; assert 'a.jpg' in str(e)
    assert 0 < found < 200


def test_checksums_find_what_a_jpeg_hides(tmp_path):
    for k in range(4): (tmp_path/f'{k}.jpg').write_bytes(JPG)
    h = hashlib.sha256(JPG).hexdigest(); (tmp_path/'SHA256SUMS.txt').write_text(''.join(f'{h} *./{k}.jpg\n' for k in range(4)))
    assert len(check_sums(tmp_path)) == 0
    (tmp_path/'1.jpg').write_bytes(changed(JPG, 900, b'?')); (tmp_path/'2.jpg').unlink()
    assert check_sums(tmp_path).values.tolist() == [['1.jpg', 'changed'], ['2.jpg', 'missing']]
    assert check_sums(tmp_path, paths=['0.jpg', '9.jpg']).values.tolist() == [['9.jpg', 'not listed']]
    for text in ('', 'abc 1.jpg', h):
        (tmp_path/'S').write_text(text)
        with pytest.raises(DataError, match='S'): check_sums(tmp_path, 'S')
    (tmp_path/'S').write_text(f'{h} ../1.jpg')
    with pytest.raises(DataError, match='outside'): check_sums(tmp_path, 'S')


# ---------------------------------------------------------------- what is read, and how

@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGB', 'RGBA', '1'])
@pytest.mark.parametrize('fmt', ['PNG', 'TIFF'])
def test_opaque_modes_are_read(tmp_path, mode, fmt):
    Image.new('L', (9, 9), 255).convert(mode).save(tmp_path/'a.png', format=fmt)
    for c in (1, 3): assert (load_image(tmp_path/'a.png', 4, c) == 255).all()


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF'])
@pytest.mark.parametrize('bits', [16, None])
def test_16_bits_are_scaled_by_65535(tmp_path, fmt, bits):
    a = np.concatenate([np.arange(0, 65536, 257), np.random.default_rng(0).integers(0, 65536, 768)]).astype(np.uint16).reshape(32, 32)
    Image.fromarray(a).save(tmp_path/'a', format=fmt)
    got = load_image(tmp_path/'a', 32, bits=bits)[0]
    assert np.array_equal(got, np.floor(a/65535*255 + .5)) and got.ravel()[:256].tolist() == list(range(256))


def test_8_bits_where_16_are_declared(tmp_path):
    for b, n in ((PNG, 'a.png'), (JPG, 'a.jpg')):
        (tmp_path/n).write_bytes(b)
        with pytest.raises(DataError, match=f'{n} has 8 bits.*16 are declared.*bits=8'): load_image(tmp_path/n, 8, bits=16)


@pytest.mark.parametrize('orientation', range(9))
@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'TIFF'])
def test_orientation(tmp_path, orientation, fmt):
    "The eight turns of the EXIF standard, written out; also where draft mode halves the sides"
    a = np.zeros((96, 160), np.uint8); a[:48, :80] = 250; a[48:, :80] = 90                       # what the file stores
    seen = {2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.T, 6: a.T[:, ::-1], 7: a.T[::-1, ::-1], 8: a.T[::-1]}.get(orientation, a)
    e = Image.Exif(); e[0x0112] = orientation
    Image.fromarray(a).save(tmp_path/'a', format=fmt, exif=e, **(dict(quality=98) if fmt == 'JPEG' else {}))
    assert np.abs(load_image(tmp_path/'a', seen.shape)[0].astype(int) - seen).max() <= 4
    small = load_image(tmp_path/'a', (seen.shape[0]//4, seen.shape[1]//4))[0].astype(int)
    assert np.abs(small[4:8, 4:8] - int(seen[20, 20])).max() <= 6 and np.abs(small[-8:-4, 4:8] - int(seen[-20, 20])).max() <= 6


@pytest.mark.parametrize('n', [300, 512, 1000])
@pytest.mark.parametrize('size', [64, (100, 60), 224])
@pytest.mark.parametrize('resize', ['crop', 'pad', 'squash'])
def test_draft_is_close(tmp_path, n, size, resize):
    yy, xx = np.mgrid[-1:1:n*1j, -1:1:(n+7)*1j]; a = (127 + 90*np.sin(6*xx*yy + 2) + 30*np.cos(19*yy)).clip(0, 255).astype(np.uint8)
    Image.fromarray(a).save(tmp_path/'a.jpg', quality=92)
    x, y = (load_image(tmp_path/'a.jpg', size, None, resize, draft=k).astype(int) for k in (True, False))
    assert x.shape == y.shape and np.abs(x-y).mean() < 1 and np.abs(x-y).max() < 16


def test_draft_never_below_the_wanted_size(tmp_path):
    Image.new('L', (800, 600), 9).save(tmp_path/'a.jpg')
    for hw in [(300, 300), (301, 400), (75, 100), (76, 100), (599, 10)]:
        w, h = open_image(tmp_path/'a.jpg', draft=hw).size; assert h >= hw[0] and w >= hw[1]
    assert open_image(tmp_path/'a.jpg', draft=(75, 100)).size == (100, 75)


@pytest.mark.parametrize('bad', [dict(bits=12), dict(bits='8'), dict(channels=2), dict(resize='stretch')])
def test_bad_settings(tmp_path, bad):
    (tmp_path/'a.png').write_bytes(PNG)
    with pytest.raises(ConfigError): load_image(tmp_path/'a.png', 8, **bad)


def test_threads(tmp_path):
    "Many threads at once, good and bad files: the same pixels, the same errors, and the same warning filters afterwards"
    import warnings
    names = {'a.png': PNG, 'a.jpg': JPG, 'a.dcm': dcm(tmp_path), 'bad.png': PNG[:99], 'bomb.png': IMAGES['bomb below twice the limit'][0]}
    for n, b in names.items(): (tmp_path/n).write_bytes(b)
    want = {n: load_image(tmp_path/n, 32) for n in ('a.png', 'a.jpg', 'a.dcm')}; wrong, before = [], list(warnings.filters)
    def work():
        for _ in range(15):
            for n in names:
                try: x = load_image(tmp_path/n, 32); ok = np.array_equal(x, want.get(n))
                except DataError: ok = n.startswith('b')
                except Exception: ok = False
                if not ok: wrong.append(n)
    ts = [threading.Thread(target=work) for _ in range(6)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert wrong == [] and list(warnings.filters) == before


# ---------------------------------------------------------------- nothing outside the root

@pytest.fixture
def tree(tmp_path):
    "A root with an image, a secret beside it, and links of several kinds"
    root = tmp_path/'root'; (root/'sub').mkdir(parents=True); (tmp_path/'root2').mkdir()
    for f in (root/'a.png', root/'sub'/'b.png', tmp_path/'secret.png', tmp_path/'root2'/'s.png'): f.write_bytes(PNG)
    (root/'out.png').symlink_to(tmp_path/'secret.png'); (root/'up').symlink_to(tmp_path); (root/'near.png').symlink_to('sub/b.png')
    (root/'chain.png').symlink_to('out.png'); (tmp_path/'alias').symlink_to(root)
    return root


@pytest.mark.parametrize('path', ['../secret.png', 'sub/../../secret.png', 'out.png', 'up/secret.png', 'chain.png', '../root2/s.png', 'up/root2/s.png', '/etc/hostname',
                                  '..', 'a.png\0'])
def test_nothing_outside_the_root_is_opened(tree, path, monkeypatch):
    from pathlib import Path
    monkeypatch.setattr(Path, 'read_bytes', lambda p: pytest.fail(f'opened {p}'))
    with pytest.raises(DataError): load_image(path, 16, root=tree)
    with pytest.raises(DataError): inside(tree, path)


@pytest.mark.parametrize('path', ['a.png', 'sub/b.png', 'near.png', 'sub/../a.png', './a.png', 'up/root/a.png'])
def test_whatever_is_inside_is_opened(tree, path):
    assert load_image(path, 16, root=tree).shape == load_image(path, 16, root=tree.parent/'alias').shape == (1, 16, 16)
    assert str(inside(tree.parent/'alias', path)).startswith(str(tree.resolve()))


def test_a_link_out_of_the_root_is_refused_by_the_loaders(tmp_path):
    root = tmp_path/'root'; root.mkdir(); r = good(root)
    (root/'i5.png').rename(tmp_path/'secret.png'); (root/'i5.png').symlink_to(tmp_path/'secret.png')
    with pytest.raises(DataError, match='i5.png'): records_dls(r, 'sex', 8, 1, device='cpu')


# ---------------------------------------------------------------- tables

def table(): return pd.DataFrame(dict(image_id=[f'i{k}.png' for k in range(6)], patient_id=[f'p{k}' for k in range(6)], sex=list('FMFMFM'), age=[20, 40, 60, 80, 90, 100],
                                      split=['train']*2 + ['valid']*2 + ['test']*2, y=[0, 1, 0, 1, 0, 1]), dtype=object)

def good(d, df=None, encoding='utf-8', labels=('y',)):
    "Images, the table as CSV, and what `read_table` makes of it"
    for k in range(6): Image.fromarray(np.full((9, 9), 40*k, np.uint8)).save(d/f'i{k}.png')
    df = table() if df is None else df
    (d/'t.csv').write_bytes(df.to_csv(index=False).encode(encoding))
    return read_table(d/'t.csv', d, list(labels))

def cell(row, col, value):
    def spoil(df): df.loc[row, col] = value; return df
    return spoil

# kind → (what is done to the table, what the error says)
TABLES = {
    'duplicate ids':       (cell(3, 'image_id', 'i1.png'), 'not unique.*i1.png'),
    'no id':               (cell(3, 'image_id', None), "'image_id' is empty"),
    'NaN patient':         (cell(3, 'patient_id', None), "'patient_id' is empty"),
    'blank patient':       (cell(3, 'patient_id', '  '), "'patient_id' is empty"),
    'unknown sex code':    (cell(3, 'sex', '2'), "'sex' holds.*'2'"),
    'unknown split':       (cell(3, 'split', 'dev'), "'split' holds.*'dev'"),
    'age of text':         (cell(3, 'age', 'old'), "'age' holds.*'old'"),
    'label of 2':          (cell(3, 'y', 2), "'y' holds.*2"),
    'label of -1':         (cell(3, 'y', -1), "'y' holds.*-1"),
    'label of text':       (cell(3, 'y', 'yes'), "'y' holds.*'yes'"),
    'label of 0.5':        (cell(3, 'y', .5), "'y' holds.*0.5"),
    'empty label':         (lambda df: df.assign(y=None), "'y' is empty"),
    'absolute path':       (cell(3, 'image_id', '/etc/i3.png'), 'leaves the root'),
    "path with '..'":      (cell(3, 'image_id', '../i3.png'), 'leaves the root'),
    "'..' inside a path":  (cell(3, 'image_id', 'sub/../i3.png'), 'leaves the root'),
    'no such image':       (cell(3, 'image_id', 'i9.png'), '1 of 6 images.*i9.png'),
    'missing column':      (lambda df: df.drop(columns='patient_id'), 'missing column.*patient_id.*found'),
    'missing label':       (lambda df: df.drop(columns='y'), "missing column.*'y'.*found"),
    'empty table':         (lambda df: df.iloc[:0], 'no rows'),
    'patient in two splits': (cell(3, 'patient_id', 'p0'), 'two values'),
    'patient of two sexes':  (cell(1, 'patient_id', 'p0'), 'two sexes'),
}


@pytest.mark.parametrize('kind', TABLES)
def test_table(tmp_path, kind):
    spoil, why = TABLES[kind]
    with pytest.raises(MedPrivacyError, match=why) as e: good(tmp_path, spoil(table()))
    assert len(str(e.value)) < 700


@pytest.mark.parametrize('encoding,why', [('utf-16', 'UTF-8'), ('latin-1', 'UTF-8')])
def test_wrong_encoding(tmp_path, encoding, why):
    with pytest.raises(DataError, match=f't.csv.*{why}'): good(tmp_path, table().assign(city='São Paulo'), encoding)


@pytest.mark.parametrize('body,why', [(b'', 'no readable CSV'), (b'a,b\n1,2,3\n4\n"', 'CSV|missing'), (PNG, 'UTF-8'), (None, 'does not exist')])
def test_no_table(tmp_path, body, why):
    good(tmp_path); f = tmp_path/'t.csv'
    if body is None: f.unlink()
    else: f.write_bytes(body)
    with pytest.raises(DataError, match=why): read_table(f, tmp_path, ['y'])


@pytest.mark.parametrize('gone', ['train', 'valid'])
def test_missing_split(tmp_path, gone):
    df = table()
    with pytest.raises(DataError, match=f"'{gone}' is empty"): records_dls(good(tmp_path, df[df.split != gone]), 'sex', 8, 1, device='cpu')


def test_no_split(tmp_path):
    with pytest.raises(DataError, match='split_patients'): records_dls(good(tmp_path, table().drop(columns='split')), 'sex', 8, 1, device='cpu')


def test_good_files_and_a_good_table_pass(tmp_path):
    "What the kinds above start from is accepted"
    x, y = records_dls(good(tmp_path), 'labels', 8, 2, device='cpu').one_batch(); assert x.shape == (2, 1, 8, 8) and y.shape == (2, 1)
    for n, b in {'a.png': PNG, 'a.jpg': JPG, 'a.dcm': dcm(tmp_path)}.items():
        (tmp_path/n).write_bytes(b); assert load_image(tmp_path/n, 32).std() > 5
    assert isinstance(good(tmp_path), Records) and kind_of(PNG) == 'PNG'


def test_there_are_enough_kinds():
    assert len(IMAGES) + len(PLACES) >= 20 and len(TABLES) >= 10
