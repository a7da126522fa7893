"""docs/tour.ipynb: it can be run from top to bottom, and what it holds is what it printed."""

import ast
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / 'docs' / 'tour.ipynb'
OURS = {path.stem for path in ROOT.glob('*.py')} | {'demo', 'tools', 'methods'}


def code_cells():
    cells = json.loads(TOUR.read_text(encoding='utf-8'))['cells']
    return [cell for cell in cells if cell['cell_type'] == 'code']


def test_what_the_tour_imports_is_there():
    """Every cell is Python, and each name that it takes from a file of this repository exists."""
    modules, checked = {}, 0
    for cell in code_cells():
        for node in ast.walk(ast.parse(''.join(cell['source']))):
            if isinstance(node, ast.Import):
                modules.update({each.name: importlib.import_module(each.name) for each in node.names if each.name in OURS})
            if isinstance(node, ast.ImportFrom) and node.module in OURS:
                for each in node.names:
                    if (ROOT / node.module / f'{each.name}.py').exists():
                        modules[each.name] = importlib.import_module(f'{node.module}.{each.name}')
                    else:
                        assert hasattr(importlib.import_module(node.module), each.name), each.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f'{node.value.id}.{node.attr}'
                checked += 1
    assert checked > 10


def test_the_tour_keeps_what_it_printed():
    """Small, of one run from top to bottom, without errors and without a path of the machine that it ran on."""
    text, cells = TOUR.read_text(encoding='utf-8'), code_cells()
    assert len(text) < 400_000 and str(ROOT) not in text and '/tmp' not in text and '/home' not in text
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    assert not [output for output in outputs if output['output_type'] == 'error' or output.get('name') == 'stderr']
    assert len([output for output in outputs if 'image/png' in output.get('data', {})]) == 3


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    """In a copy of the repository, as after a clone; its assertions hold, and it prints what the file holds but for seconds."""
    pytest.importorskip('ipykernel')
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    clone = tmp_path / 'clone'
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns('.git', 'data', 'runs', '.*'))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(path for path in sys.path if path and path != str(ROOT)))
    book = nbformat.read(clone / 'docs' / 'tour.ipynb', 4)
    nbclient.NotebookClient(book, timeout=300, resources=dict(metadata=dict(path=str(clone / 'docs')))).execute()

    def table(cells):  # of the test, rounded to points
        text = ''.join(''.join(output['text']) for cell in cells for output in cell['outputs'] if 'text' in output)
        return [line.split('±')[0].rsplit('.', 1)[0] for line in text.splitlines() if '±' in line]

    ran = [cell for cell in book.cells if cell.cell_type == 'code']
    assert table(ran) == table(code_cells()) and len(table(ran)) == 8
