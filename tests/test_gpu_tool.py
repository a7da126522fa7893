"""tools/gpu.py: what it writes, whatever becomes of its parts; marked slow, the whole of it in small."""

import json

import pytest

from tools import gpu


def run(monkeypatch, capsys, out):
    monkeypatch.setattr('sys.argv', ['gpu.py', f'--out={out}'])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return str(end.value), capsys.readouterr().out, json.loads((out / 'gpu.json').read_text())['parts']


def test_parts_that_end_well_fail_and_take_too_long(monkeypatch, capsys, tmp_path):
    parts = [('A table', 60, ['-c', 'print("no" "ise\\n| a |\\n| - |\\n| 7 |")']),
             ('Fails', 60, ['-c', 'import sys; print("why"); sys.exit(3)']),
             ('Hangs', 3, ['-c', 'import time; print("begun", flush=True); time.sleep(60)'])]
    monkeypatch.setattr(gpu, 'parts_in_small', lambda out: parts)
    monkeypatch.setattr(gpu, 'parts_for_cuda', lambda out: parts)
    message, printed, found = run(monkeypatch, capsys, tmp_path / 'new')
    assert [part['status'] for part in found] == ['exit status 0', 'exit status 3', 'ended after 3 s']
    assert '| 7 |' in printed and 'why' in printed and 'begun' in printed and 'noise' not in printed
    assert (tmp_path / 'new' / 'gpu.md').read_text() in printed and 'gpu.md' in message


def test_its_parts_fit_into_nine_minutes(tmp_path):
    assert sum(seconds for _, seconds, _ in gpu.parts_for_cuda(str(tmp_path))) <= 9 * 60


@pytest.mark.slow
def test_all_parts_in_small(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('sys.argv', ['gpu.py', f'--out={tmp_path}'])
    monkeypatch.setattr(gpu.torch.cuda, 'is_available', lambda: False)
    gpu.main()
    printed = capsys.readouterr().out
    assert '| vba |' in printed and '| ours, fp32 |' in printed and 'vba_frames' in printed
