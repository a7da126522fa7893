"""HMDB51, ARN's classes. Recipe: thesis, Table 4.9."""

config = dict(
    dataset='hmdb51',
    data_root='data/hmdb51',
    max_iters=1000,
    augment='randaug',
    # as published for 1-shot, where the backbone trained along at the same rate: --finetune=<lr>
    hyrsm=dict(lr=5e-5, weight_decay=1e-3, max_iters=1000, warmup_iters=150, meta_batch=8, shot=1, queries=7,
               auxiliary=0.15, drops={150: 0.5, 300: 0.1, 600: 0.01}),
    clip_fsar=dict(lr=1e-5, weight_decay=1e-3, max_iters=1250, warmup_iters=175, meta_batch=16, shot=1, queries=5,
                   video_text=1.2, drops={350: 0.1, 525: 0.01}),
    norm='imagenet',
    splits=dict(
        train=[
            'brush_hair', 'catch', 'chew', 'clap', 'climb', 'climb_stairs', 'dive', 'draw_sword', 'dribble', 'drink',
            'fall_floor', 'flic_flac', 'handstand', 'hug', 'jump', 'kiss', 'pullup', 'punch', 'push', 'ride_bike',
            'ride_horse', 'shake_hands', 'shoot_bow', 'situp', 'stand', 'sword', 'sword_exercise', 'throw', 'turn', 'walk',
            'wave',
        ],
        val=[
            'cartwheel', 'eat', 'golf', 'hit', 'laugh', 'shoot_ball', 'shoot_gun', 'smile', 'somersault', 'swing_baseball',
        ],
        test=[
            'fencing', 'kick', 'kick_ball', 'pick', 'pour', 'pushup', 'run', 'sit', 'smoke', 'talk',
        ],
    ),
    fetch='''HMDB51: https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/. Expected:
  data/hmdb51/<class>/*.avi     the videos, unpacked; no list is needed
Elsewhere: --data_root=...''',
)
