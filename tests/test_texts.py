"One reader of prompts for every file that people keep them in: the right texts, or one line with file, line and reason"
import json, pickle

import pytest

from dmd2_nb.coco_eval import coco_captions, read_prompts
from dmd2_nb.sdxl.data import PromptFile
from dmd2_nb.system import texts

bom = b'\xef\xbb\xbf'


@pytest.fixture
def write(tmp_path):
    def f(name, data):
        (tmp_path/name).write_bytes(data if isinstance(data, bytes) else data.encode('utf-8'))
        return tmp_path/name
    return f


def test_it_is_one_reader(): assert read_prompts is texts.read_prompts


good = {
    'mark in front': ('a.txt', bom + b'a cat\n', ['a cat']),
    'mark in front of a table': ('a.csv', bom + b'caption\na cat\n', ['a cat']),
    'mark and quotes': ('a.csv', bom + b'"caption","n"\n"a cat","1"\n', ['a cat']),
    'mark in front of json': ('a.json', bom + b'["a cat"]', ['a cat']),
    'mark in front of json lines': ('a.jsonl', bom + b'{"caption": "a cat"}\n', ['a cat']),
    'line break in a field': ('a.csv', 'caption\n"a red\ncar"\n', ['a red car']),
    'windows line break in a field': (
        'a.csv',
        'id,caption\r\n1,"a red\r\ncar"\r\n2,b\r\n',
        ['a red car', 'b'],
    ),
    'line break in a tab table': ('a.tsv', 'text\tid\n"a red\ncar"\t1\n', ['a red car']),
    'comma and quotes in a field': (
        'a.csv',
        'caption\n"a ""big"", red car"\n',
        ['a "big", red car'],
    ),
    'quote within a word': ('a.csv', 'caption\na 5" disc\n', ['a 5" disc']),
    'semicolons': ('a.csv', 'id;caption\n1;a cat, asleep\n', ['a cat, asleep']),
    'tabs in a csv': ('a.csv', 'id\tcaption\n1\ta cat, asleep\n', ['a cat, asleep']),
    'column in the middle': ('a.csv', 'id,caption,url\n1,a cat,http\n', ['a cat']),
    'column with capitals and spaces': ('a.csv', 'id, Caption \n1,a cat\n', ['a cat']),
    'column text': ('a.csv', 'id,TEXT\n1,a cat\n', ['a cat']),
    'caption before prompt': ('a.csv', 'prompt,caption\nno,a cat\n', ['a cat']),
    'empty lines of a table': ('a.csv', 'caption\na cat\n\nb\n\n', ['a cat', 'b']),
    'no end of line': ('a.csv', 'caption\na cat', ['a cat']),
    'objects by line': (
        'a.jsonl',
        '{"caption": "a cat"}\n{"caption": "b\\nc"}\n',
        ['a cat', 'b c'],
    ),
    'texts by line': ('a.jsonl', '"a cat"\n\n"b"\n', ['a cat', 'b']),
    'ending ndjson': ('a.ndjson', '{"prompt": "a cat"}\n', ['a cat']),
    'lines in a json': ('a.json', '{"text": "a cat"}\n{"text": "b"}\n', ['a cat', 'b']),
    'list of objects': ('a.json', '[{"prompt": "a cat", "n": 1}]', ['a cat']),
    'object of lists': ('a.json', '{"prompts": ["a cat", "b"], "n": 2}', ['a cat', 'b']),
    'old mac': ('a.txt', 'a cat\rb\r', ['a cat', 'b']),
    'windows': ('a.txt', 'a cat\r\nb\r\n', ['a cat', 'b']),
    'repeated': ('a.txt', 'a cat\nb\na cat\n', ['a cat', 'b', 'a cat']),
    'capital ending': ('A.CSV', 'caption\na cat\n', ['a cat']),
    'no ending': ('prompts', 'a cat\n', ['a cat']),
    'another language': (
        'a.txt',
        'ein Fuchs im Schnee, schön\n狐\n',
        ['ein Fuchs im Schnee, schön', '狐'],
    ),
    'pickled list': ('a.pkl', pickle.dumps(['a cat', 'b'], protocol=4), ['a cat', 'b']),
}


@pytest.mark.parametrize('name, data, want', good.values(), ids=good)
def test_right_texts(write, name, data, want):
    file = write(name, data)
    assert read_prompts(file) == want
    assert PromptFile(file).prompts == PromptFile(str(file)).prompts == want


@pytest.mark.parametrize('char', ['\u2028', '\u2029', '\x0b', '\x0c', '\x85', '\x1c', '\x1e', '\r'])
@pytest.mark.parametrize('name, head', [('a.txt', ''), ('a.csv', 'caption\n'), ('a.jsonl', None)])
def test_lines_end_at_line_feeds_alone(write, char, name, head):
    "Python's splitlines knows ten more line ends"
    lines = [f'a{char}b', 'c']
    if head is None: data = '\n'.join(json.dumps(o, ensure_ascii=False) for o in lines)
    else: data = head+'\n'.join(f'"{o}"' if name == 'a.csv' else o for o in lines)+'\n'
    got = read_prompts(write(name, data))
    assert [o.split() for o in got] == [['a', 'b'], ['c']]


bad = {
    'latin-1': ('a.txt', b'a cat\ncaf\xe9\n', r'a.txt, line 2: not UTF-8 \(byte 0xe9 at 3\)'),
    'latin-1 in a table': (
        'a.csv',
        b'caption\na\nb\ncaf\xe9\n',
        r'a.csv, line 4: not UTF-8 \(byte 0xe9 at 3\)',
    ),
    'latin-1 in json': ('a.json', b'["caf\xe9"]', r'a.json, line 1: not UTF-8 \(byte 0xe9 at 5\)'),
    'latin-1 in json lines': (
        'a.jsonl',
        b'"a"\n"caf\xe9"',
        r'a.jsonl, line 2: not UTF-8 \(byte 0xe9 at 4\)',
    ),
    'utf-16': ('a.txt', 'a cat\n'.encode('utf-16'), r'line 1: not UTF-8 .*UTF-16'),
    'utf-16 table': (
        'a.csv',
        b'\xfe\xff' + 'caption\na'.encode('utf-16-be'),
        r'line 1: not UTF-8 .*UTF-16',
    ),
    'utf-16 without a mark': ('a.txt', 'a\nb\n'.encode('utf-16-le'), r'line 1: not text'),
    'zero byte': ('a.txt', b'a\nb\0c\n', r'line 2: not text'),
    'empty file': ('a.txt', b'', 'a.txt has no prompts'),
    'mark alone': ('a.txt', bom, 'a.txt has no prompts'),
    'empty table': ('a.csv', b'', 'a.csv has no prompts'),
    'table of a header': ('a.csv', b'caption\n', 'a.csv has no prompts'),
    'empty list': ('a.json', b'[]', 'a.json has no prompts'),
    'empty lines': ('a.jsonl', b'\n\n', 'a.jsonl has no prompts'),
    'empty line': ('a.txt', b'a\n\nb\n', 'line 2: empty prompt'),
    'blank line': ('a.txt', b'a\n \t \nb\n', 'line 2: empty prompt'),
    'two line feeds at the end': ('a.txt', b'a\n\n', 'line 2: empty prompt'),
    'empty field': ('a.csv', b'id,caption\n1,"two\nlines"\n2,\n', 'line 4: empty prompt'),
    'empty item': ('a.json', b'["a", ""]', 'item 2: empty prompt'),
    'other columns': (
        'a.csv',
        b'id,words\n1,x\n',
        "no column caption, prompt or text; there are: 'id', 'words'",
    ),
    'no header': ('a.csv', b'a cat\na dog\n', "no column .* there are: 'a cat'"),
    'two of a name': ('a.csv', b'caption,Caption\na,b\n', 'two columns called caption'),
    'comma without quotes': (
        'a.csv',
        b'id,caption\n1,a\n2,a cat, asleep\n',
        'line 3: 3 fields where the first line has 2',
    ),
    'short row': ('a.csv', b'id,caption\n1\n', 'line 2: 1 fields where'),
    'open quote': ('a.csv', b'caption\na\n"b\nc\n', 'line 3: unexpected end of data'),
    'quote not doubled': ('a.csv', b'caption\n"a "big" cat"\n', 'line 2: .*quote'),
    'cut json': ('a.json', b'["a", ', 'a.json: cannot be read as prompts: no JSON'),
    'cut json line': ('a.jsonl', b'"a"\n{"caption": "b\n', 'a.jsonl, line 2: no JSON'),
    'number': ('a.json', b'["a", 3]', 'item 2: 3 is no text'),
    'nothing': ('a.jsonl', b'{"caption": null}\n', 'line 1: None is no text'),
    'object without': (
        'a.jsonl',
        b'{"caption": "a"}\n{"file": "b"}\n',
        "line 2: no column .* there are: 'file'",
    ),
    'texts by name': ('a.json', b'{"1.png": "a cat"}', "no column .* there are: '1.png'"),
    'one text': ('a.json', b'"a cat"', "is no list of texts"),
    'one text for a list': ('a.json', b'{"caption": "a cat"}', "is no list of texts"),
    'half a character': ('a.json', b'["\\ud83d"]', 'item 1: not text'),
    'zero in json': ('a.json', b'["a\\u0000b"]', 'item 1: not text'),
    'deep': ('a.json', b'[' * 100_000, 'cannot be read as prompts'),
    'annotations without names': (
        'a.json',
        b'{"annotations": [{"id": 1}]}',
        "annotations need image_id, id and caption",
    ),
    'annotations without text': (
        'a.json',
        b'{"annotations": [{"id": 1, "image_id": 2}]}',
        'image 2: None is no text',
    ),
    'parquet': ('a.parquet', b'PAR1', 'a.parquet is a table .* save its prompts as .csv'),
    'spreadsheet': ('a.xlsx', b'PK\3\4', 'a.xlsx is a spreadsheet'),
    'packed': ('a.txt.gz', b'\x1f\x8b', 'a.txt.gz is packed'),
    'weights': ('a.safetensors', b'', 'holds numbers'),
    'no pickle': ('a.pkl', b'nope', 'a.pkl is truncated or damaged'),
    'pickle of something else': ('a.pkl', pickle.dumps(3), 'a.pkl: .* 3 is no list of texts'),
}


@pytest.mark.parametrize('name, data, says', bad.values(), ids=bad)
def test_one_clear_line(write, name, data, says):
    file = write(name, data)
    for reader in (read_prompts, PromptFile):
        with pytest.raises(ValueError, match=says) as e: reader(file)
        assert str(file) in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 600


def test_many_columns_make_no_long_message(write):
    with pytest.raises(ValueError) as e:
        read_prompts(write('a.csv', ','.join('x'*300+str(i) for i in range(99))+'\n'))
    assert len(str(e.value)) < 600


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='gone.txt is missing'):
        read_prompts(tmp_path/'gone.txt')
    with pytest.raises(ValueError, match='is a folder'): read_prompts(tmp_path)


def test_a_column_of_another_name(write):
    file = write('a.csv', 'caption,Words\na,b\n')
    assert read_prompts(file, 'words') == ['b']
    with pytest.raises(ValueError, match="no column title; there are: 'caption', 'Words'"):
        read_prompts(file, 'title')


def test_pickles_are_read_as_data(tmp_path):
    class Bomb:
        def __reduce__(self): return (print, ('ran',))
    (tmp_path/'bad.pkl').write_bytes(pickle.dumps(['a', Bomb()]))
    with pytest.raises(ValueError, match='bad.pkl'): PromptFile(tmp_path/'bad.pkl')


def test_lists_are_cleaned_alike():
    assert PromptFile(['a  cat ', 'b']).prompts == ['a cat', 'b']
    for wrong, says in (
        (['a', ''], 'line 2: empty prompt'),
        (['a', None], 'line 2: None is no text'),
        ([], 'has no prompts'),
    ):
        with pytest.raises(ValueError, match=f'the list.*{says}'): PromptFile(wrong)


def test_captions_beside_pictures(tmp_path):
    "NAME.txt beside NAME.png: the same bytes, the same rules"
    from PIL import Image
    from dmd2_nb.sdxl.adapt import FolderPictures
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    (tmp_path/'a.txt').write_bytes(bom+'ein\r\nFuchs'.encode())
    assert FolderPictures(tmp_path, 8).prompts == ['ein Fuchs']
    (tmp_path/'a.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match=r'a.txt, line 1: not UTF-8 \(byte 0xe9 at 3\)'):
        FolderPictures(tmp_path, 8)


def test_captions_of_coco(write):
    rows = [dict(id=i, image_id=i//2, caption=f' a  {i}') for i in range(6)]
    file = write('c.json', bom+json.dumps(dict(annotations=rows)).encode())
    assert (
        [o['caption'] for o in coco_captions(file)] == read_prompts(file) == ['a 0', 'a 2', 'a 4']
    )
    with pytest.raises(ValueError, match='c.json.*annotations'):
        coco_captions(write('c.json', '{"a": 1}'))
