"""What a machine with a GPU can say of this code, in one run of under nine minutes: one Markdown and one JSON file.

    python tools/gpu.py --out=runs/gpu

The tests that need CUDA, a training step of every method, encoding, a test of thousands of episodes, the demo, trained and
tested, and a step from its clips. Nothing is fetched: weights are random, or the demo's own, and clips are made on the spot.
Without a GPU it runs all of it in small, which shows that it runs and says nothing of speed. A part that outlasts its share of
the time is ended and named, and each is written down as soon as it is over.
"""

import json
import os
import platform
import subprocess
import sys
import time

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from checkpoint import whole  # noqa: E402

BENCH, DEMO = os.path.join('tools', 'bench.py'), os.path.join('sample_configs', 'moving_shapes.py')
SMALL = ['--clip=demo/tiny_clip.pt', '--frames=2', '--way=2', '--shot=1', '--queries=1', '--meta_batch=1', '--rounds=1',
         '--device=cpu']


def parts_for_cuda(out):
    """[(title, seconds that it may take, arguments of python), ...], what matters most first."""
    found = [('The tests that need CUDA', 45, ['-m', 'pytest', '-q', '-n', '0', '-m', 'cuda'])]
    for clip, dtype, compiled, seconds in (('ViT-B/32', 'float16', False, 30), ('ViT-B/32', 'bfloat16', False, 30),
                                           ('ViT-B/16', 'float16', False, 30), ('ViT-B/32', 'float16', True, 100)):
        found.append((f'A training step of every method: {clip}, {dtype}{", compiled" * compiled}', seconds,
                      [BENCH, 'methods', f'--clip=random:{clip}', f'--dtype={dtype}', f'--compile={compiled}']))
    for clip in ('ViT-B/32', 'ViT-B/16'):
        found.append((f'VBA, a training step without and with adapters: {clip}', 40,
                      [BENCH, 'train', f'--clip=random:{clip}', '--dtype=float16', '--compile=False']))
    return found + [
        ('Encoding', 25, [BENCH, 'encode', '--images=512']),
        ('10,000 test episodes', 40, [BENCH, 'eval', '--episodes=10000', '--videos=2000', '--rounds=1']),
        ('The demo', 120, ['train.py', DEMO, f'--out_dir={out}/demo', '--overwrite=True']),
        ('VBA, a training step from the loader: the clips of the demo, enlarged', 30, [
            BENCH, 'train', DEMO, '--clip=random:ViT-B/32', '--resize=256', '--meta_batch=3', '--compile=False']),
    ]


def parts_in_small(out):
    return [
        ('The tests that need CUDA', 60, ['-m', 'pytest', '-q', '-n', '0', '-m', 'cuda']),
        ('A training step of every method', 120, [BENCH, 'methods', *SMALL]),
        ('VBA, a training step without and with adapters', 120, [BENCH, 'train', *SMALL]),
        ('Encoding', 60, [BENCH, 'encode', '--images=4', *SMALL]),
        ('Test episodes', 60, [BENCH, 'eval', '--episodes=2', '--videos=50', *SMALL]),
    ]


def about():
    """The machine, in words."""
    if not torch.cuda.is_available():
        return f'no GPU, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}'
    asked = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    driver = subprocess.run(asked, capture_output=True, text=True)
    card = torch.cuda.get_device_properties(0)
    return (f'{card.name}, {card.total_memory / 1e9:.0f} GB, driver {driver.stdout.strip()}, CUDA {torch.version.cuda}, '
            f'torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores')


def measure(title, limit, arguments):
    """Runs one part -> dict(title=, command=, status=, seconds=, output=)."""
    began = time.time()
    try:
        run = subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=limit, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        status, output = f'exit status {run.returncode}', run.stdout
    except subprocess.TimeoutExpired as error:
        status, output = f'ended after {limit} s', (error.stdout or b'').decode(errors='replace')
    return dict(title=title, command=' '.join(['python', *arguments]), status=status, seconds=round(time.time() - began, 1),
                output=output)


def markdown(machine, found):
    """Tables as the parts printed them, of what printed none its last lines."""
    text = f'# What a run of tools/gpu.py printed\n\n{machine}\n'
    for part in found:
        lines = part['output'].splitlines()
        tables = [line for line in lines if line.startswith('|')]
        body = '\n'.join(tables) if tables else '```\n' + '\n'.join(lines[-8:]) + '\n```'
        text += f'\n## {part["title"]}\n\n`{part["command"]}`: {part["status"]}, {part["seconds"]} s\n\n{body}\n'
    return text


def main():
    if len(sys.argv) != 2 or not sys.argv[1].startswith('--out=') or sys.argv[1] == '--out=':
        sys.exit(__doc__)
    out = os.path.abspath(sys.argv[1].removeprefix('--out='))
    parts, machine, found = parts_for_cuda(out) if torch.cuda.is_available() else parts_in_small(out), about(), []
    for part in tqdm(parts, unit='part', disable=None):
        found.append(measure(*part))
        with whole(os.path.join(out, 'gpu.md')) as file:
            file.write(markdown(machine, found))
        with whole(os.path.join(out, 'gpu.json')) as file:
            json.dump(dict(machine=machine, parts=found), file, indent=1)
    print(markdown(machine, found))
    if not all(part['status'] == 'exit status 0' for part in found):
        sys.exit(f'Not every part ended well: see {out}/gpu.md.')


if __name__ == '__main__':
    main()
