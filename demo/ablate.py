"""The table of decisions: each choice of the model flipped alone, on the demo, over three seeds.

    python demo/ablate.py            # trains each in turn; what is done already is not done again
    python demo/ablate.py 0 1        # these seeds alone

Trains the demo for fewer steps than its config does and prints accuracies on the unseen test motions, 5-way 1-shot, as mean
± standard deviation over the seeds. What the frozen CLIP makes of the training and validation clips is kept from one training
to the next.
"""

import contextlib
import json
import os
import statistics
import sys

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import train  # noqa: E402

COMMON = ['--max_iters=300', '--eval_interval=150', '--test_shots=[1]', '--test_episodes=3000', '--cache_prefix=1',
          '--workers=1']
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


def keep(encode_frozen):
    """encode_frozen, but what the four kept levels without adapters gave for a split, draw and seed is not computed again."""
    memory = {}

    def kept(model, split, reader, *args):
        if model.adapters or len(model.levels) != 4:
            return encode_frozen(model, split, reader, *args)
        key = reader.config['seed'], split.name, args[2:]
        if key not in memory:
            memory[key] = encode_frozen(model, split, reader, *args)
        return memory[key]
    return kept


def run(options, seed):
    """One training and its test -> {method: accuracy in percent}."""
    name = '_'.join([*(o.strip('-') for o in options), f'seed={seed}'])
    out_dir = os.path.join(ROOT, 'runs', 'ablate', name)
    results = os.path.join(out_dir, 'results.json')
    if not os.path.exists(results):
        os.makedirs(out_dir, exist_ok=True)
        sys.argv = ['train.py', os.path.join(ROOT, 'sample_configs', 'moving_shapes.py'), *COMMON, *options, f'--seed={seed}',
                    f'--out_dir={out_dir}']
        with open(os.path.join(out_dir, 'output.txt'), 'w') as output, contextlib.redirect_stdout(output):
            train.main()
    with open(results) as file:
        return {row['method']: row['accuracy'] for row in json.load(file)}


def main():
    seeds = [int(seed) for seed in (sys.argv[1:] or '012')]
    train.encode_frozen = keep(train.encode_frozen)
    table = {label: [] for label in ROWS}
    for seed, (label, options) in tqdm([(seed, item) for seed in seeds for item in ROWS.items()], disable=None):
        table[label].append(run(options, seed))
    print(f'moving shapes, test, 5-way 1-shot, 3000 episodes, 300 steps, seeds {", ".join(map(str, seeds))}\n')
    print('| | joint | inductive |\n| --- | --- | --- |')
    for label, runs in table.items():
        cells = []
        for method in ('vba-joint', 'vba-inductive'):
            values = [r[method] for r in runs if method in r]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.1f}{spread}' if values else '')
        print(f'| {label} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
