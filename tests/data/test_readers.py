"What all readers refuse alike: a column that is not there, a code that is not known, no labels; and what the error must name"
import pandas as pd
import pytest

from medprivacy.core import ConfigError, DataError
from medprivacy.data.registry import FAKES, READERS, read_dataset

MIMIC, IV = 'mimic-cxr-2.0.0-{}.csv.gz', 'mimic-iv/hosp/patients.csv.gz'
BOOK, UKA = 'ODIR-5K_Training_Annotations(Updated)_V2.xlsx', 'UKA/chest_radiograph/master_list.csv'
PAD, PLUS, NIH = 'PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv', 'df_chexpert_plus_240401.csv', 'Data_Entry_2017_v2020.csv'
ANNOTATED = 'annotations/image_labels_{}.csv'

# data set → table → columns that are needed
COLUMNS = {
    'brset':         {'label_brset.csv': ['image_id', 'patient_id', 'patient_sex', 'patient_age', 'exam_eye', 'camera', 'drusens']},
    'mbrset':        {'labels_mbrset.csv': ['patient', 'age', 'sex', 'file', 'laterality', 'final_icdr', 'final_edema']},
    'chexpert':      {'train.csv': ['Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', 'Edema'], 'valid.csv': ['Path', 'Edema']},
    'chexpert_plus': {PLUS: ['path_to_image', 'deid_patient_id', 'frontal_lateral', 'ap_pa', 'age', 'sex', 'split']},
    'mimic_cxr':     {MIMIC.format('metadata'): ['ViewPosition', 'StudyDate', 'dicom_id'], MIMIC.format('split'): ['split'],
                      MIMIC.format('chexpert'): ['Edema', 'study_id'], IV: ['gender', 'anchor_age', 'anchor_year', 'subject_id']},
    'uka_cxr':       {UKA: ['image_id', 'subject_id', 'subset', 'split', 'patient_sex', 'gender', 'birth_date', 'examination_date', 'congestion',
                            'atelectasis_left']},
    'nih_cxr14':     {NIH: ['Image Index', 'Finding Labels', 'Patient ID', 'Patient Age', 'Patient Gender', 'View Position']},
    'vindr_cxr':     {ANNOTATED.format('train'): ['image_id', 'rad_id', 'Pneumothorax'],
                      ANNOTATED.format('test'): ['image_id', 'Other disease', 'Pneumothorax']},
    'padchest':      {PAD: ['ImageID', 'ImageDir', 'StudyDate_DICOM', 'StudyID', 'PatientID', 'PatientBirth', 'PatientSex_DICOM', 'Projection', 'MethodLabel',
                            'Labels']},
    'odir':          {BOOK: ['ID', 'Patient Age', 'Patient Sex', 'Left-Fundus', 'Right-Fundus', 'Left-Diagnostic Keywords', 'Right-Diagnostic Keywords', 'N']},
    'odir-kaggle':   {'full_df.csv': ['filename', 'Patient Sex', 'Left-Diagnostic Keywords']}}

# data set → table → columns in which a code must be known
CODED = {
    'brset':         {'label_brset.csv': ['patient_sex', 'exam_eye', 'camera', 'DR_ICDR', 'DR_SDRG', 'drusens', 'quality', 'diabetes', 'focus']},
    'mbrset':        {'labels_mbrset.csv': ['sex', 'laterality', 'final_icdr', 'final_edema', 'insurance', 'educational_level']},
    'chexpert':      {'train.csv': ['Sex', 'Frontal/Lateral', 'AP/PA', 'Edema'], 'valid.csv': ['Sex', 'Edema']},
    'chexpert_plus': {PLUS: ['sex', 'frontal_lateral', 'ap_pa', 'split', 'race']},
    'mimic_cxr':     {MIMIC.format('metadata'): ['ViewPosition'], MIMIC.format('split'): ['split'], MIMIC.format('chexpert'): ['Edema'],
                      IV: ['gender', 'anchor_age']},
    'uka_cxr':       {UKA: ['gender', 'split', 'congestion']},
    'nih_cxr14':     {NIH: ['Patient Gender', 'View Position', 'Finding Labels']},
    'vindr_cxr':     {ANNOTATED.format('train'): ['Pneumothorax'], ANNOTATED.format('test'): ['Pneumothorax']},
    'padchest':      {PAD: ['Projection', 'MethodLabel']},
    'odir':          {BOOK: ['Patient Sex', 'D']}, 'odir-kaggle': {'full_df.csv': ['Patient Sex', 'D']}}

AGES = {'brset': ('label_brset.csv', 'patient_age'), 'mbrset': ('labels_mbrset.csv', 'age'), 'chexpert': ('train.csv', 'Age'), 'chexpert_plus': (PLUS, 'age'),
        'nih_cxr14': (NIH, 'Patient Age'), 'odir': (BOOK, 'Patient Age'), 'odir-kaggle': ('full_df.csv', 'Patient Age')}

def each(table): return [pytest.param(n, f, c, id=f'{n}-{f.rpartition("/")[2].partition(".")[0]}-{c}') for n, files in table.items() for f, cs in files.items() for c in cs]


@pytest.fixture(scope='module')
def trees(tmp_path_factory):
    "A look-alike of each data set, written when first asked for"
    made = {}
    def tree(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp('t')/name
            FAKES[name.removesuffix('-kaggle')](made[name], **(dict(form='kaggle') if name.endswith('-kaggle') else {}))
        return made[name]
    return tree

@pytest.fixture
def changed(trees):
    "Function: changes one table of a look-alike, which is put right after the test, and gives the folder"
    kept = {}
    def change(name, file, how):
        path = trees(name)/file
        kept[path] = path.read_bytes()
        df = how(pd.read_excel(path, dtype=object) if path.suffix == '.xlsx' else pd.read_csv(path, dtype=object, encoding='utf-8-sig'))
        df.to_excel(path, index=False) if path.suffix == '.xlsx' else df.to_csv(path, index=False)
        return trees(name)
    yield change
    for path, old in kept.items(): path.write_bytes(old)

def read(name, root, labels=None):
    return read_dataset(name.removesuffix('-kaggle'), root, labels, missing='drop', **(dict(mimic_iv=root/'mimic-iv') if name == 'mimic_cxr' else {}))

def put(row, column, value):
    "In one row; where the rows are eyes, in both of the patient"
    def how(df): df.loc[df.ID == df.ID[row] if 'filename' in df else row, column] = value; return df
    return how


@pytest.mark.parametrize('name,file,column', each(COLUMNS))
def test_missing_column(changed, name, file, column):
    root = changed(name, file, lambda df: df.rename(columns={column: f'{column}_new'}))
    with pytest.raises(DataError) as e: read(name, root)
    assert repr(column) in str(e.value) and f'{column}_new' in str(e.value) and str(root/file) in str(e.value), 'name file and column, and list those found'


@pytest.mark.parametrize('name,file,column', each(CODED))
def test_unknown_code(changed, name, file, column):
    root = changed(name, file, put(4, column, 'Lump'))
    with pytest.raises(DataError) as e: read(name, root)
    said = str(e.value).lower()
    for part in (str(root/file).lower(), column.lower(), 'lump', 'row 4' if name != 'mimic_cxr' or file != IV else 'row'): assert part in said, part


@pytest.mark.parametrize('name', AGES)
def test_age_that_is_none(changed, name):
    file, column = AGES[name]
    root = changed(name, file, put(0, column, 'old'))
    with pytest.raises(DataError, match="'old'.* in [12] row") as e: read(name, root)
    assert str(root/file) in str(e.value) and 'age' in str(e.value)


@pytest.mark.parametrize('name', READERS)
@pytest.mark.parametrize('labels,words', [([], 'labels is empty'), ((), 'labels is empty'), ('Edema', 'must be a list'), (['a', 'a'], 'named twice')])
def test_labels_that_are_no_list_of_labels(trees, name, labels, words, tmp_path):
    "Refused before a file is opened; an empty list is not the default list"
    with pytest.raises(ConfigError, match=f'{name}: .*{words}'): READERS[name](tmp_path, labels)
