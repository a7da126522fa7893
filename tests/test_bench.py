"""Every sub-command of bench.py runs, at a tiny size, and writes the table it prints."""

import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from config import ROOT, load_config, resolve
from make_clips import write_clip
from model import Step, look
from tools import bench

CLIP = '--clip=' + os.path.join(ROOT, 'demo', 'tiny_clip.pt')
SMALL = (CLIP, '--frames=2', '--rounds=1', '--device=cpu')


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """A function that runs bench.py with these arguments -> its rows."""
    monkeypatch.setattr(bench.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.setattr(bench, 'machine', lambda device, dtype: (1e11, 1e10))

    def run(*argv):
        monkeypatch.setattr('sys.argv', ['bench.py', *argv, f'--out={tmp_path}/table.json'])
        bench.main()
        rows = json.loads((tmp_path / 'table.json').read_text())['rows']
        printed = capsys.readouterr().out
        assert rows and all(row['method'] in printed for row in rows)
        return rows
    return run


def test_decode(table, monkeypatch):
    family = {'a.mp4': ('libx264', (64, 48), 20, 25, dict(g='10', bf='2')), 'b.avi': ('mpeg4', (64, 48), 20, 25, {})}
    monkeypatch.setattr(bench, 'FAMILIES', family)
    bench.clip_maker.cache_clear()
    rows = table('decode', '--rounds=1', '--workers=1')
    ours = [row for row in rows if row['method'] == 'ours']
    assert len(ours) == 2 and all(row['right frames'] == '8 of 8' and row['clips/s best'] > 0 for row in ours)
    assert {row['method'] for row in rows} >= {'PyAV', 'ours, kept frames'}


def test_encode(table):
    rows = {row['method']: row for row in table('encode', '--images=4', *SMALL)}
    assert float(rows['ours, fp32']['lowest cosine']) > 0.99999
    if 'ours, bf16' in rows:  # not where the processor only emulates it
        assert float(rows['ours, bf16']['lowest cosine']) > 0.99


def test_train(table, tmp_path):
    for name, i in itertools.product('abcdef', range(2)):
        (tmp_path / 'clips' / name).mkdir(parents=True, exist_ok=True)
        write_clip(tmp_path / 'clips' / name / f'{i}.mp4', frames=4)
    (tmp_path / 'config.py').write_text(f'''config = dict(
        dataset='tiny', data_root={str(tmp_path / 'clips')!r}, workers=0, way=2, shot=1, queries=1, meta_batch=2, flip=False,
        splits=dict(train=['a', 'b'], val=['c', 'd'], test=['e', 'f']))''')
    rows = table('train', str(tmp_path / 'config.py'), *SMALL)
    both, loaded = ['ours', 'nn.MultiheadAttention'], ['ours, from the frame cache', 'ours, decoding']
    assert [row['method'] for row in rows if not row['adapters']] == [*both, *(f'{name}, kept' for name in both), *loaded]
    assert [row['method'] for row in rows if row['adapters']] == both + loaded


def test_memory(table):
    rows = table('memory', '--way=2', '--shot=1', '--queries=24', '--meta_batch=2', '--levels=2', *SMALL)
    assert [row['adapters'] for row in rows] == [False, False, True, True, True]
    assert rows[0]['GB'] > rows[1]['GB'] and rows[2]['GB'] > rows[3]['GB'] > rows[4]['GB']


def test_step_bytes_of_a_few_small_videos_by_hand(monkeypatch):
    """Little more than weights, gradients, AdamW's two moments and two batches of frames. Norms are in float32, as on CUDA."""
    config, clip, model = built('--frames=1', '--way=2', '--shot=1', '--queries=1', '--meta_batch=1')
    norms, norm, parameters = set(), F.layer_norm, {*clip.visual.parameters(), *model.parameters()}
    monkeypatch.setattr(F, 'layer_norm', lambda x, *args: norms.add(x.dtype) or norm(x, *args))
    by_hand = 2 * (4 * 3 * 64 * 64) + sum(p.numel() * (16 if p.requires_grad else 4) for p in parameters)
    assert by_hand < bench.step_bytes(clip.visual, model, config) < 1.2 * by_hand and norms == {torch.float32}


def built(*options):
    """-> a configuration, its CLIP and VBA."""
    config = load_config([CLIP, '--device=cpu', *options])
    resolve(config)
    clip = checkpoint.load_clip(config)
    return config, clip, checkpoint.build(config, clip, [])


def test_live_bytes_by_hand():
    with bench.LiveBytes() as live:
        a = torch.zeros(1000)  # 4,000 bytes
        b = (a + 1)[:500]  # a view keeps all 4,000
        del a
        c = torch.zeros(250) + 1  # for a moment 1,000 more than its own 1,000
        c += 1
    assert (live.now, live.peak) == (5000, 8000) and len(b) == 500


def test_methods(table):
    rows = {row['method']: row for row in table('methods', '--way=2', '--shot=1', '--queries=1', '--meta_batch=1', CLIP,
                                                '--frames=3', '--rounds=1', '--device=cpu')}
    assert set(rows) == {'clip_fsar', 'd2st', 'efficient_prompt', 'hyrsm', 'ladder', 'matching', 'matrix', 'otam', 'proto',
                         'trx', 'ts_fsar', 'vba', 'vba_frames'}
    assert rows['matrix']['parameters'] == 9 and rows['vba']['GB'] > rows['matrix']['GB'] > 0


def test_eval(table):
    rows = table('eval', '--videos=50', '--episodes=2', *SMALL)
    assert [row['videos an episode'] for row in rows] == [30, 30, 50, 50]


def test_projected_attention_is_the_same_function():
    config, clip, model = built('--frames=2', '--way=2', '--shot=1', '--queries=1', '--meta_batch=2')
    seen = look(clip.visual, torch.randint(256, (8, 2, 3, 64, 64), dtype=torch.uint8), model.sees)
    ours, theirs = (Step(each)(seen, bench.episodes_of(config))[1] for each in (model, bench.projected(model)))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_flops_of_the_frozen_part():
    """By hand: a block is 12 D^2 products a token and 2 L D of attention, beside the patches' embedding."""
    options = '--frames=2', '--way=1', '--shot=1', '--queries=1', '--meta_batch=1'
    config, clip, model = built('--temporal_adapter=False', *options)
    visual, frames = clip.visual, torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8)
    (frozen, forward, backward), moved = bench.count(config, visual, model, frames)
    dim, tokens, layers = visual.proj.shape[0], visual.grid ** 2 + 1, len(visual.transformer.resblocks)
    by_hand = 2 * 4 * (layers * tokens * (12 * dim + 2 * tokens) * dim + (tokens - 1) * visual.conv1.weight.numel())
    assert frozen == pytest.approx(by_hand, rel=0.01)
    assert 0 < forward < backward and moved > 0
