"""DICOM pixels against formulas written out here pixel by pixel, tags, and every file that pydicom brings along

The reference below follows PS3.3 C.11 with plain numbers and loops over values; it shares no code with the library.
"""
import logging
import math
import threading
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medprivacy.core import ConfigError, DataError
from medprivacy.data.dicom import dicom_tags, read_dicom, write_dicom

BUNDLED = Path(pydicom.__file__).parent/'data'/'test_files'


# ---------------------------------------------------------------- the slow reference

def grey_of(s, *, bits, signed=False, photometric='MONOCHROME2', slope=1., intercept=0., window=None, function='LINEAR', modality=None, voi=None):
    "The grey in [0,1] of one stored value; `modality` and `voi` are (first, bits, entries)"
    least, most = (-2**(bits-1), 2**(bits-1)-1) if signed else (0, 2**bits-1)
    def table(t, v):
        first, depth, entries = t
        i = int(round(v)) - first
        return entries[0 if i < 0 else len(entries)-1 if i >= len(entries) else i], 2**depth - 1
    if modality:
        v, hi = table(modality, s); lo = 0
    else:
        v = s*slope + intercept
        lo, hi = sorted([least*slope + intercept, most*slope + intercept])
    if voi:
        out, top = table(voi, v); g = out/top
    elif window:
        c, w = window
        if function == 'SIGMOID': g = 1/(1 + math.exp(-4*(v-c)/w))
        else:
            if function == 'LINEAR': c, w = c - .5, w - 1
            g = 0. if v <= c - w/2 else 1. if v > c + w/2 else (v-c)/w + .5
    else: g = (v - lo)/(hi - lo)
    return 1 - g if photometric == 'MONOCHROME1' else g


def reference(pixels, **o):
    full = 255 if o['bits'] == 8 else 65535
    seen = {int(s): grey_of(int(s), **o)*full for s in np.unique(pixels)}
    return np.array([[seen[int(s)] for s in row] for row in pixels])


def agrees(got, pixels, **o):
    assert got.dtype == (np.uint8 if o['bits'] == 8 else np.uint16) and got.shape == pixels.shape
    want = reference(pixels, **o)
    assert np.abs(got.astype(float) - want).max() <= .5 + 1e-6, 'further from the formula than rounding'


def stored(bits, signed=False, seed=0, hw=(12, 17)):
    "Values over the whole range, both ends among them"
    lo, hi = (-2**(bits-1), 2**(bits-1)-1) if signed else (0, 2**bits-1)
    a = np.random.default_rng(seed).integers(lo, hi, hw, endpoint=True)
    a[0, :4] = lo, hi, (lo+hi)//2, lo+1
    return a.astype(np.int16 if signed else np.uint16)


def lut(first, bits, entries, signed_first=False):
    "A table as an item of ModalityLUTSequence or VOILUTSequence"
    item = Dataset()
    item.add_new(0x00283002, 'SS' if signed_first else 'US', [len(entries) % 65536, first, bits])
    item.add_new(0x00283006, 'OW', np.asarray(entries, '<u2').tobytes())
    item.ModalityLUTType = 'US'
    return Sequence([item])


# ---------------------------------------------------------------- the grid

WINDOWS = {'none': None, 'narrow': (.4, .2), 'wide': (.5, 3.), 'outside': (2., .5), 'one': (.5, None)}


@pytest.mark.parametrize('bits', range(8, 17))
@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
@pytest.mark.parametrize('window', WINDOWS)
def test_grid(tmp_path, bits, photometric, window):
    "bits x photometric x window x slope: the file holds what was stored, the pixels are those of the formulas"
    a = stored(bits, seed=bits)
    for slope, intercept in [(1, 0), (2.5, -1000), (1, -1024), (-1, 0), (.25, 3)]:
        ends = sorted([intercept, (2**bits-1)*slope + intercept]); w = WINDOWS[window]
        if w: w = (round(ends[0] + w[0]*(ends[1]-ends[0]), 2), 1 if w[1] is None else max(2, round(w[1]*(ends[1]-ends[0]))))
        f = write_dicom(tmp_path/'a.dcm', a, bits=bits, photometric=photometric, window=w, slope=slope, intercept=intercept)
        agrees(read_dicom(f), a, bits=bits, photometric=photometric, window=w, slope=slope, intercept=intercept)
        ds = pydicom.dcmread(f)
        assert (ds.BitsStored, ds.BitsAllocated, ds.PhotometricInterpretation) == (bits, 8 if bits == 8 else 16, photometric)
        assert np.array_equal(ds.pixel_array, a)


@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('bits', [9, 12, 16])
def test_window_functions_and_signed_pixels(tmp_path, function, photometric, signed, bits):
    a = stored(bits, signed, seed=1); w = (2**(bits-2), 2**(bits-1)+1)
    f = write_dicom(tmp_path/'a.dcm', a, bits=bits, photometric=photometric, window=w, slope=2, intercept=-7, VOILUTFunction=function)
    agrees(read_dicom(f), a, bits=bits, signed=signed, photometric=photometric, window=w, slope=2, intercept=-7, function=function)


@pytest.mark.parametrize('bits', [10, 12, 15])
def test_signed_values_without_sign_extension(tmp_path, bits):
    "Some writers leave the bits above the sign at 0"
    a = stored(bits, True, seed=2); f = write_dicom(tmp_path/'a.dcm', a, bits=bits)
    ds = pydicom.dcmread(f); ds.PixelData = (a.astype(np.int32) & (2**bits-1)).astype('<u2').tobytes(); ds.save_as(f)
    agrees(read_dicom(f), a, bits=bits, signed=True)


@pytest.mark.parametrize('depth', [8, 10, 12, 16])
@pytest.mark.parametrize('bits', [8, 12, 16])
@pytest.mark.parametrize('which', ['voi', 'modality', 'both'])
def test_tables(tmp_path, depth, bits, which):
    "Tables shorter than the range, that begin above 0, with outputs of any depth; 8-bit outputs of long tables do not wrap around"
    a, r = stored(bits, seed=3), np.random.default_rng(depth)
    m = (20, depth, r.integers(0, 2**depth, 200).tolist())
    v = (5, depth, np.sort(r.integers(0, 2**depth, 150 if bits == 8 else 1000)).tolist())
    tags, o = {}, {}
    if which in ('modality', 'both'): tags['ModalityLUTSequence'] = lut(*m); o['modality'] = m
    if which in ('voi', 'both'):      tags['VOILUTSequence'] = lut(*v); o['voi'] = v
    agrees(read_dicom(write_dicom(tmp_path/'a.dcm', a, bits=bits, **tags)), a, bits=bits, **o)


def test_a_table_goes_before_a_window_and_the_first_window_counts(tmp_path):
    a = stored(12); v = (0, 12, np.arange(4095, -1, -1).tolist())
    f = write_dicom(tmp_path/'a.dcm', a, window=(100, 10), VOILUTSequence=lut(*v))
    agrees(read_dicom(f), a, bits=12, voi=v)
    f = write_dicom(tmp_path/'b.dcm', a, WindowCenter=[2000, 100], WindowWidth=[800, 5])
    agrees(read_dicom(f), a, bits=12, window=(2000, 800))


def test_full_table_with_a_negative_start(tmp_path):
    "65,536 entries are written as 0; the first value may be negative when pixels are signed"
    a = stored(16, True); v = (-32768, 16, np.arange(65536).tolist())
    agrees(read_dicom(write_dicom(tmp_path/'a.dcm', a, bits=16, VOILUTSequence=lut(*v, signed_first=True))), a, bits=16, signed=True, voi=v)


@pytest.mark.parametrize('shape', ['INVERSE', 'IDENTITY'])
def test_inverted_once(tmp_path, shape):
    "PresentationLUTShape repeats what MONOCHROME1 says"
    a = stored(12); f = write_dicom(tmp_path/'a.dcm', a, photometric='MONOCHROME1', PresentationLUTShape=shape)
    agrees(read_dicom(f), a, bits=12, photometric='MONOCHROME1')


def test_a_negative_is_the_same_picture(tmp_path):
    a = stored(12)
    x, y = (read_dicom(write_dicom(tmp_path/f'{p}.dcm', v, photometric=p)) for p, v in (('MONOCHROME1', 4095-a), ('MONOCHROME2', a)))
    assert np.abs(x.astype(int) - y).max() <= 1


# ---------------------------------------------------------------- colour, frames, big endian

def ybr(rgb):
    "PS3.3 C.7.6.3.1.2"
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y = [.299*r + .587*g + .114*b, -.1687*r - .3313*g + .5*b + 128, .5*r - .4187*g - .0813*b + 128]
    return np.rint(np.stack(y, -1)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('photometric', ['RGB', 'YBR_FULL', 'YBR_FULL_422'])
def test_colour_is_rgb(tmp_path, photometric):
    "A fundus photo in either coding; pairs of equal pixels, so that 4:2:2 loses nothing"
    rgb = np.random.default_rng(0).integers(0, 256, (10, 6, 3)).astype(np.uint8).repeat(2, 1)
    got = read_dicom(write_dicom(tmp_path/'a.dcm', rgb if photometric == 'RGB' else ybr(rgb), bits=8, photometric=photometric))
    assert got.dtype == np.uint8 and np.abs(got.astype(int) - rgb).max() <= (0 if photometric == 'RGB' else 2)


@pytest.mark.parametrize('bits', [10, 12, 16])
def test_deep_colour_is_stretched(tmp_path, bits):
    a = np.stack([stored(bits, seed=k) for k in range(3)], -1)
    got = read_dicom(write_dicom(tmp_path/'a.dcm', a, bits=bits, photometric='RGB'))
    assert got.dtype == np.uint16 and np.abs(got - a*(65535/(2**bits-1))).max() <= .5 + 1e-6


@pytest.mark.parametrize('colour', [False, True])
def test_frames_are_refused_unless_named(tmp_path, colour):
    a = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3) if colour else (3, 8, 9)).astype(np.uint8)
    f = write_dicom(tmp_path/'a.dcm', a, bits=8, photometric='RGB' if colour else 'MONOCHROME2')
    with pytest.raises(DataError, match='a.dcm holds 3 frames'): read_dicom(f)
    for k in range(3): assert np.array_equal(read_dicom(f, frame=k), a[k])
    with pytest.raises(DataError, match='no frame=3'): read_dicom(f, frame=3)
    for bad in (-1, 1.):
        with pytest.raises(ConfigError, match='frame'): read_dicom(f, frame=bad)


def test_frame_0_of_a_single_image(tmp_path):
    f = write_dicom(tmp_path/'a.dcm', stored(12)); assert np.array_equal(read_dicom(f), read_dicom(f, frame=0))


# ---------------------------------------------------------------- files that contradict themselves

def spoiled(path, **tags):
    "Rewrite tags of a good file; None removes"
    write_dicom(path, stored(12), window=(2000, 800))
    ds = pydicom.dcmread(path)
    for k, v in tags.items():
        if v is None: delattr(ds, k)
        else: setattr(ds, k, v)
    ds.save_as(path); return path


@pytest.mark.parametrize('tags,why', [
    (dict(PixelData=None), 'holds no pixels'), (dict(Rows=None), "lacks.*Rows"), (dict(PhotometricInterpretation='ARGB'), 'colours'),
    (dict(Rows=0), 'has no pixels'), (dict(Rows=60000, Columns=60000), 'MAX_IMAGE_PIXELS'), (dict(Rows=13), 'cannot be decoded'),
    (dict(BitsStored=10, HighBit=9), 'says 10 bits but holds'), (dict(HighBit=15), 'up to bit 15'), (dict(BitsStored=7, HighBit=6), 'stores 7 bits'),
    (dict(BitsStored=17, HighBit=16), 'stores 17'), (dict(WindowWidth=None), 'WindowCenter alone'), (dict(WindowWidth=0), 'Window Width'),
    (dict(VOILUTFunction='CUBIC'), 'CUBIC'), (dict(RescaleSlope=0, RescaleIntercept=5), 'erase'),
    (dict(VOILUTSequence=lut(0, 8, [300]*9)), 'VOI table'), (dict(ModalityLUTSequence=lut(0, 20, [3]*9)), 'modality table')],
    ids=lambda p: '-'.join(p) if isinstance(p, dict) else '')
def test_contradictions(tmp_path, tags, why):
    with pytest.raises(DataError, match=f'bad.dcm.*{why}'): read_dicom(spoiled(tmp_path/'bad.dcm', **tags))


@pytest.mark.parametrize('uid', ['1.2.3.4.5', '1.2.840.10008.1.2.9', '1.2.840.113619.5.2'])
def test_unknown_transfer_syntax(tmp_path, uid):
    f = write_dicom(tmp_path/'a.dcm', stored(12)); b = f.read_bytes()
    old = b'1.2.840.10008.1.2.1\0'; new = uid.encode()[:len(old)].ljust(len(old), b'\0')
    assert old in b; f.write_bytes(b.replace(old, new, 1))
    with pytest.raises(DataError, match='a.dcm has the unknown transfer syntax'): read_dicom(f)


@pytest.mark.parametrize('cut', [0, 100, 131, 140, 300, 500, -1, -100])
def test_truncated_anywhere(tmp_path, cut):
    f = write_dicom(tmp_path/'a.dcm', stored(12)); f.write_bytes(f.read_bytes()[:cut])
    with pytest.raises(DataError, match='a.dcm'): read_dicom(f)


def test_random_damage_gives_an_image_or_a_data_error(tmp_path):
    "Header bytes overwritten at random: never another exception, never a warning"
    good = write_dicom(tmp_path/'a.dcm', stored(12), window=(2000, 900), slope=2, intercept=1).read_bytes(); r, refused = np.random.default_rng(0), 0
    for _ in range(300):
        b = bytearray(good)
        for i in r.integers(132, len(good)-12*17*2, r.integers(1, 4)): b[i] = r.integers(256)
        (tmp_path/'b.dcm').write_bytes(b)
        for f in (read_dicom, dicom_tags):
            try: f(tmp_path/'b.dcm')
            except DataError as e: refused += 1; assert 'b.dcm' in str(e)
    assert refused > 20


def test_bytes_behind_the_pixels_are_padding(tmp_path):
    f = write_dicom(tmp_path/'a.dcm', stored(12)); good = read_dicom(f)
    ds = pydicom.dcmread(f); ds.PixelData += bytes(100); ds.save_as(f)
    assert np.array_equal(read_dicom(f), good)


# ---------------------------------------------------------------- tags

@pytest.mark.parametrize('sex,want', [('M', 'M'), ('F', 'F'), ('O', None), ('', None), (None, None), ('m', 'M'), ('Female', 'F')])
def test_sex(tmp_path, sex, want): assert dicom_tags(write_dicom(tmp_path/'a.dcm', stored(12), sex=sex))['sex'] == want

def test_unknown_sex(tmp_path):
    with pytest.raises(DataError, match="a.dcm: PatientSex holds 'X'"): dicom_tags(write_dicom(tmp_path/'a.dcm', stored(12), sex='X'))


@pytest.mark.parametrize('age', ['058Y', '011M', '003W', '005D', '000Y', None, ''])
def test_age_is_text(tmp_path, age): assert dicom_tags(write_dicom(tmp_path/'a.dcm', stored(12), age=age))['age_raw'] == (age or None)


def test_all_tags(tmp_path):
    f = write_dicom(tmp_path/'a.dcm', stored(12), view='AP', patient_id='p1', StudyInstanceUID='1.2.3', Laterality='R', Manufacturer='Acme', ManufacturerModelName='X 1')
    got = dicom_tags(f); uid = got.pop('image_id')
    assert got == dict(patient_id='p1', study_id='1.2.3', sex='M', age_raw='058Y', view='AP', laterality='R', device='Acme X 1')
    assert uid == pydicom.dcmread(f).SOPInstanceUID


def test_tags_of_a_bare_file_are_none(tmp_path):
    got = dicom_tags(write_dicom(tmp_path/'a.dcm', stored(12), sex=None, age=None, view=None))
    assert {k for k, v in got.items() if v is None} == {'patient_id', 'study_id', 'sex', 'age_raw', 'view', 'laterality', 'device'}


def test_tags_need_no_pixels(tmp_path):
    f = write_dicom(tmp_path/'a.dcm', stored(12, hw=(300, 300)), sex='F'); f.write_bytes(f.read_bytes()[:1500])
    assert dicom_tags(f)['sex'] == 'F'
    with pytest.raises(DataError): read_dicom(f)


def test_no_header_is_told(tmp_path, capfd, caplog):
    "Values that break the standard, which pydicom would quote in a warning: not printed, not logged, not in an error"
    f = write_dicom(tmp_path/'a.dcm', stored(12), PatientName='Secret^Name'); b = f.read_bytes()
    f.write_bytes(b.replace(b'PA ', b'P\xe4 ').replace(b'058Y', b'Secr'))
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG, 'pydicom'):
        warnings.simplefilter('always'); read_dicom(f); dicom_tags(f)
        (tmp_path/'b.dcm').write_bytes(f.read_bytes()[:600])
        with pytest.raises(DataError) as e: read_dicom(tmp_path/'b.dcm')
    out = ''.join(capfd.readouterr()) + caplog.text + str(e.value) + repr(e.value.__cause__)
    assert 'Secr' not in out and 'Invalid' not in out


def test_silence_is_undone(tmp_path):
    "Threads that overlap leave the warning filters and pydicom's logger as they were"
    f = write_dicom(tmp_path/'a.dcm', stored(12)); before, log = list(warnings.filters), logging.getLogger('pydicom')
    ts = [threading.Thread(target=lambda: [read_dicom(f) for _ in range(20)]) for _ in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert list(warnings.filters) == before and log.propagate


# ---------------------------------------------------------------- the writer

def test_writing_is_reproducible(tmp_path):
    a, b = (write_dicom(tmp_path/k/'a.dcm', stored(12)) for k in 'ab'); assert a.read_bytes() == b.read_bytes()
    assert dicom_tags(a)['image_id'] != dicom_tags(write_dicom(tmp_path/'c.dcm', stored(12)))['image_id']


@pytest.mark.parametrize('o', [dict(bits=7), dict(bits=17), dict(bits=10), dict(bits=8), dict(photometric='CMYK'), dict(photometric='RGB')])
def test_writer_refuses(tmp_path, o):
    with pytest.raises(ConfigError): write_dicom(tmp_path/'a.dcm', stored(12), **o)
    assert not (tmp_path/'a.dcm').exists()

def test_writer_takes_whole_numbers_only(tmp_path):
    with pytest.raises(ConfigError, match='float'): write_dicom(tmp_path/'a.dcm', stored(12)/4095)


# ---------------------------------------------------------------- every file that comes with pydicom

def bundled(): return sorted(p for p in BUNDLED.glob('*') if p.is_file()) if BUNDLED.is_dir() else []

IMAGE_COUNT = 37    # of the files of pydicom 3.0 that need no further package


def expected(ds, a):
    "What a bundled file should look like, from its own header and pydicom's stored values"
    bits = ds.BitsStored
    if a.ndim == 3: return a*((255 if bits == 8 else 65535)/(2**bits-1))
    w = ds.get('WindowCenter')
    if w is not None: w = tuple(float(v if not isinstance(v, pydicom.multival.MultiValue) else v[0]) for v in (ds.WindowCenter, ds.WindowWidth))
    return reference(a, bits=bits, signed=bool(ds.PixelRepresentation), photometric=ds.PhotometricInterpretation, window=w,
                     slope=float(ds.get('RescaleSlope', 1)), intercept=float(ds.get('RescaleIntercept', 0)))


@pytest.mark.parametrize('path', bundled(), ids=lambda p: p.name)
def test_bundled(path):
    "Either the image of the reference, or an error with the name of the file, a reason and a remedy"
    try: got = read_dicom(path)
    except DataError as e:
        assert path.name in str(e) and (';' in str(e) or 'stores' in str(e)); return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); ds = pydicom.dcmread(path); a = ds.pixel_array
    assert got.dtype == (np.uint16 if ds.BitsStored > 8 or ds.PhotometricInterpretation == 'PALETTE COLOR' else np.uint8)
    if ds.PhotometricInterpretation == 'PALETTE COLOR':
        want = np.stack([np.frombuffer(ds[f'{c}PaletteColorLookupTableData'].value, '<u2')[a] for c in ('Red', 'Green', 'Blue')], -1)
    elif a.ndim == 3: want = expected(ds, pydicom.pixels.pixel_array(ds))
    else: want = expected(ds, a)
    assert np.abs(got.astype(float) - want).max() <= .5 + 1e-6


def test_bundled_files_that_need_a_package():
    "The error names it (where the package is installed, the file is read)"
    for name, package in {'JPEG-lossy.dcm': 'pylibjpeg-libjpeg', 'JPEGLSNearLossless_16.dcm': 'pyjpegls', 'SC_rgb_jpeg_gdcm.dcm': 'pylibjpeg-libjpeg',
                          'MR_small_jpeg_ls_lossless.dcm': 'pyjpegls'}.items():
        if not (BUNDLED/name).exists(): pytest.skip('this pydicom brings no test files')
        try: read_dicom(BUNDLED/name)
        except DataError as e: assert 'pip install' in str(e) and package in str(e) and name in str(e)


def test_bundled_codings_of_one_image_agree():
    "The same MR in seven codings"
    same = [BUNDLED/f'MR_small{k}.dcm' for k in ('', '_RLE', '_bigendian', '_expb', '_implicit', '_jp2klossless', '_padded')]
    if not all(p.exists() for p in same): pytest.skip('this pydicom brings no test files')
    first, *rest = map(read_dicom, same)
    assert first.std() > 1000 and all(np.array_equal(first, r) for r in rest)


def test_most_bundled_images_are_read():
    if not bundled(): pytest.skip('this pydicom brings no test files')
    n = 0
    for p in bundled():
        try: read_dicom(p); n += 1
        except DataError: pass
    assert n >= IMAGE_COUNT
