"""Several runs in one picture: loss and training accuracy over the steps, and a table of their tests.

    python tools/plot.py runs/* --out=runs.png
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from testing import line  # noqa: E402
from tools import console, pictures  # noqa: E402


def main():
    console.begin()
    options = [arg for arg in sys.argv[1:] if arg.startswith('--')]
    folders = [arg for arg in sys.argv[1:] if os.path.exists(os.path.join(arg, 'log.jsonl'))]
    if not folders or any(not option.startswith('--out=') for option in options):
        sys.exit(f'{__doc__}\nNone of these is a folder of train.py with a log.jsonl: {" ".join(sys.argv[1:])}')
    out = options[-1].removeprefix('--out=') if options else 'runs.png'
    for folder in folders:
        results = os.path.join(folder, 'results.json')
        print(folder + ('' if os.path.exists(results) else ': no results.json, its test has not ended'))
        if os.path.exists(results):
            with open(results, encoding='utf-8') as file:
                print(*(f'  {line(row)}' for row in json.load(file) if row['checkpoint']), sep='\n')
    logs = {os.path.normpath(folder): os.path.join(folder, 'log.jsonl') for folder in folders}
    pictures.curves(logs, out)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
