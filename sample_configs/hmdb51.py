"""HMDB51, ARN's classes. Recipe: thesis, Table 4.9."""

config = dict(
    dataset='hmdb51',
    data_root='data/hmdb51',
    max_iters=1000,
    augment='randaug',
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
