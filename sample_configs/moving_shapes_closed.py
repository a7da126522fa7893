"""The demo as a closed set: 20 of its training motions, of each 70 clips to train, 10 to validate and 20 to test; and where a
method reads names, 20 of its test motions by their names alone.

    python train.py sample_configs/moving_shapes_closed.py --method=evl
    python train.py sample_configs/moving_shapes_closed.py --method=xclip --per_class=8
"""

config = dict(
    base='moving_shapes.py',
    dataset='moving_shapes_closed',
    data_root='data/moving_shapes_closed',
    prepare='demo/shapes.py --per_class=100 --groups=4',
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
    splits=dict(
        train=[
            'move right then move up', 'move up then move right', 'move right and move up',
            'move right and move up, too far and back', 'back first, then move right and move up',
            'move right then spin clockwise', 'spin clockwise then move right', 'move right and spin clockwise',
            'move right and spin clockwise, too far and back', 'back first, then move right and spin clockwise',
            'move right then grow', 'grow then move right', 'move right and grow', 'move right and grow, too far and back',
            'back first, then move right and grow',
            'move right then fade in', 'fade in then move right', 'move right and fade in',
            'move right and fade in, too far and back', 'back first, then move right and fade in',
        ],
        test=[
            'move right then move down', 'move down then move right', 'move right and move down',
            'move right and move down, too far and back', 'back first, then move right and move down',
            'move left then move up', 'move up then move left', 'move left and move up',
            'move left and move up, too far and back', 'back first, then move left and move up',
            'move left then grow', 'grow then move left', 'move left and grow', 'move left and grow, too far and back',
            'back first, then move left and grow',
            'move right then shrink', 'shrink then move right', 'move right and shrink',
            'move right and shrink, too far and back', 'back first, then move right and shrink',
        ],
    ),
)
