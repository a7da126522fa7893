"""The demo as a closed set: the 180 training motions, of each clip 14 to train, 2 to validate and 4 to test; and where a method
reads names, the 50 test motions by their names alone.

    python train.py sample_configs/moving_shapes_closed.py --method=evl
    python train.py sample_configs/moving_shapes_closed.py --method=xclip --per_class=2
"""

config = dict(
    base='moving_shapes.py',
    dataset='moving_shapes_closed',
    method='evl',
    closed_set=True,
    holdout=dict(val=0.1, test=0.2),
    meta_batch=32,
    max_iters=1000,
    lr=1e-3,
)
