"""The demo as a closed set: the 180 training motions, of each 14 clips to train, 2 to validate and 4 to test; and where a
method reads names, the 50 test motions by their names alone.

    python train.py sample_configs/moving_shapes_closed.py --method=evl
    python train.py sample_configs/moving_shapes_closed.py --method=xclip --per_class=2 --max_iters=150
"""

config = dict(
    base='moving_shapes.py',
    dataset='moving_shapes_closed',
    closed_set=True,
    holdout=dict(val=0.1, test=0.2),
    method='evl',
    linear=dict(lr=1e-2),
    efficient_prompt=dict(prefix=8, postfix=8),  # as many as the tiny CLIP's short texts leave room for
    xclip=dict(finetune=1e-4),
    tws=dict(finetune=1e-4),
    meta_batch=32,
    max_iters=600,
    eval_interval=100,
    grad_clip=0.0,
)
