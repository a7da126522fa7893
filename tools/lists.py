"""The lists that people have -> rows of class, path and the part of the file. README says which they are."""

import json
import os
import re
import sys

from decode import VIDEOS

# Dialects of text lists: kind, and what a line looks like. Of those that fit, the one counts whose paths are on the disk.
DIALECTS = [(kind, re.compile(pattern)) for kind, pattern in (
    ('FineGym categories', r'Clabel:\s*(?P<number>\d+);.*?\) (?P<name>.+)'),
    ('list of split and class number', r'(?P<split>train|val|test)(?P<index>\d+)//?(?P<path>.+)'),
    ('list of path, class, split', r'(?P<path>[^,\t]+)[,\t]\s*(?P<label>[^/\t]+)[,\t]\s*(?P<of>train|val|test)\w*'),
    ('list of class, path, split', r'(?P<label>[^,\t]+)[,\t]\s*(?P<path>[^,\t]+)[,\t]\s*(?P<of>train|val|test)\w*'),
    ('list of path, tab, class', r'(?P<path>[^\t]+)\t\s*(?P<label>[^\t]+)'),
    ('list of class, tab, path', r'(?P<label>[^\t]+)\t\s*(?P<path>[^\t]+)'),
    ('list of path, comma, class', r'(?P<path>[^,]+),\s*(?P<label>[^/]+)'),
    ('list of class, comma, path', r'(?P<label>[^,]+),(?P<path>\S[^,]*)'),  # with a space: a class name that has a comma
    ('list of path, space, class', r'(?P<path>.*\S)\s+(?P<label>[^/\s]+)(?<!' + ')(?<!'.join(map(re.escape, VIDEOS)) + ')'),
    ('list of class/video', r'(?P<path>(?:.*/)?(?P<label>[^/]+)/[^/]+)'),
)]


def read_list(path, find):
    """A list -> what kind it is, rows [(label, path, start, end, split), ...], class names {number: name} if it holds these.

    find: function (path in the list, class) -> the same on the disk or None. A label is a class name, a number (int), or
    (split, index in that split's list of classes); split: of single videos, where the list tells it, else None.
    """
    try:
        with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
            text = file.read()
        if text.lstrip()[:1] in ('[', '{'):
            return read_json(json.loads(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f'Cannot read the annotations {path}: {type(error).__name__}: {error}')
    lines, fits = [line.strip() for line in text.splitlines() if line.strip()], []
    for kind, pattern in DIALECTS:
        matches = [pattern.fullmatch(line) for line in lines]
        if any(matches) and all(matches[1:]):  # the first line may name the columns
            rows = [match.groupdict() for match in matches if match]
            there = [bool(find(row['path'], row.get('label'))) for row in rows] if 'path' in rows[0] else []
            fits.append((sum(there), kind, rows, there))
    if not fits:
        wrong = next((line for line in lines if not DIALECTS[-1][1].fullmatch(line)), '')
        sys.exit(f'{path} is in none of the known formats (see README); a line that does not fit: {wrong[:80]!r}.')
    _, kind, rows, there = max(fits, key=lambda fit: fit[0])  # the first one of the best
    if 'number' in rows[0]:
        return kind, [], {int(row['number']): row['name'] for row in rows}
    if any(there) and not there[0] and names_columns(rows):
        rows = rows[1:]
    numbers = [row['path'] for row in rows]
    if numbers[0] in '01' and numbers == [str(int(numbers[0]) + i) for i in range(len(numbers))]:
        return 'list of class names', [], {int(row['path']): row['label'] for row in rows}
    hmdb = re.fullmatch(r'(.+)_test_split\d+\.txt', os.path.basename(path))  # one file a class; 1 and 2 are train and test
    if hmdb:
        of = {'1': 'train', '2': 'test'}
        return 'HMDB51 split', [(hmdb[1], row['path'], None, None, of.get(row['label'])) for row in rows], {}
    return kind, [((row['split'], int(row['index'])) if 'split' in row else
                   int(row['label']) if row['label'].isdigit() else row['label'], row['path'], None, None, row.get('of'))
                  for row in rows], {}


def names_columns(rows):
    """Whether the first row is a header: words alone, and a class that no other row has."""
    first, *others = (row.get('label') for row in rows)
    return bool(re.fullmatch(r'[A-Za-z_ ]+', rows[0]['path'])) and first not in others


def read_json(items):
    """Diving48's and Something-Something's JSON, as read_list."""
    if isinstance(items, dict):
        return 'class names', [], {int(number): name for name, number in items.items()}
    if isinstance(items[0], list):
        return 'Diving48 vocabulary', [], {number: ' '.join(words) for number, words in enumerate(items)}
    if 'vid_name' in items[0]:
        rows = [(item['label'], item['vid_name'], item['start_frame'], item['end_frame'], None) for item in items]
        return 'Diving48 JSON', rows, {}
    if 'template' not in items[0]:
        raise ValueError('its entries have no label (no "template" or "vid_name")')
    rows = [(re.sub(r'[\[\]]', '', item['template']), item['id'], None, None, None) for item in items]
    return 'Something-Something JSON', rows, {}
