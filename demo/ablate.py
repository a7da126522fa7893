"""The table of decisions: each choice of the model flipped alone, on the demo, over three seeds.

    python demo/ablate.py            # trains each in turn; what is done already is not done again
    python demo/ablate.py 0 1        # these seeds alone

Trains the demo for fewer steps than its config does and prints accuracies on the unseen test motions, 5-way 1-shot, as mean
± standard deviation over the seeds. What the frozen CLIP shows of the clips is kept from one training to the next.
"""

import json
import os
import statistics
import subprocess
import sys

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEPT = os.path.join(ROOT, 'runs', 'ablate', 'features')
COMMON = ['--max_iters=300', '--eval_interval=150', '--test_shots=[1]', '--test_episodes=3000', '--cache_prefix=1',
          '--workers=1', f'--features_dir={KEPT}']
ROWS = {  # label: options
    'the demo: no adapter, four levels, joint, serial, class': [],
    'cross-video attention: inductive': ['--cross_video=inductive'],
    'cross-video attention: off': ['--cross_video=False'],
    'one level': ['--levels=1'],
    'MLP: parallel (as printed)': ['--mlp_order=parallel'],
    'loss: pairwise (as printed)': ['--loss=pairwise'],
    'temporal embedding: zero at the start': ['--alpha_init=zero'],
    'temporal adapter: on': ['--temporal_adapter=True'],
}


def run(options, seed):
    """One training and its test -> {method: accuracy in percent}."""
    name = '_'.join([*(o.strip('-') for o in options), f'seed={seed}'])
    out_dir = os.path.join(ROOT, 'runs', 'ablate', name)
    results = os.path.join(out_dir, 'results.json')
    if not os.path.exists(results):
        os.makedirs(out_dir, exist_ok=True)
        command = [sys.executable, 'train.py', 'sample_configs/moving_shapes.py', *COMMON, *options, f'--seed={seed}',
                   f'--out_dir={out_dir}']
        with open(os.path.join(out_dir, 'output.txt'), 'w') as output:
            subprocess.run(command, cwd=ROOT, stdout=output, check=True)
    with open(results) as file:
        return {row['method']: row['accuracy'] for row in json.load(file)}


def main():
    seeds = [int(seed) for seed in (sys.argv[1:] or '012')]
    table = {label: [] for label in ROWS}
    for seed, (label, options) in tqdm([(seed, item) for seed in seeds for item in ROWS.items()], disable=None):
        table[label].append(run(options, seed))
    print(f'moving shapes, test, 5-way 1-shot, 3000 episodes, 300 steps, seeds {", ".join(map(str, seeds))}\n')
    print('| | joint | inductive |\n| --- | --- | --- |')
    for label, runs in table.items():
        cells = []
        for names in (('vba joint',), ('vba inductive', 'vba')):
            values = [r[name] for r in runs for name in names if name in r]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.1f}{spread}' if values else '')
        print(f'| {label} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
