"""Kinetics-100, CMN's classes. Recipe: thesis, Table 4.9."""

config = dict(
    dataset='kinetics',
    data_root='data/kinetics',
    annotations='data/kinetics_lists',
    lr=1e-05,
    max_iters=1000,
    vba=dict(temporal_adapter=False),
    # as published for 1-shot, where the backbone trained along at the same rate: --finetune=<lr>
    hyrsm=dict(lr=2.2e-5, weight_decay=1e-3, max_iters=300, warmup_iters=25, meta_batch=16, shot=1, queries=7,
               auxiliary=0.4, position_a=512.0, position_b=0.01, drops={50: 0.5, 75: 0.1, 125: 0.05}),
    clip_fsar=dict(lr=1e-5, weight_decay=1e-3, max_iters=1250, warmup_iters=62, meta_batch=16, shot=1, queries=5,
                   video_text=1.5, drops={187: 0.1, 312: 0.01}),
    norm='imagenet',
    splits=dict(
        train=[
            'air drumming', 'arm wrestling', 'beatboxing', 'biking through snow', 'blowing glass', 'blowing out candles',
            'bowling', 'breakdancing', 'bungee jumping', 'catching or throwing baseball', 'cheerleading', 'cleaning floor',
            'contact juggling', 'cooking chicken', 'country line dancing', 'curling hair', 'deadlifting', 'doing nails',
            'dribbling basketball', 'driving tractor', 'drop kicking', 'dying hair', 'eating burger', 'feeding birds',
            'giving or receiving award', 'hopscotch', 'jetskiing', 'jumping into pool', 'laughing', 'making snowman',
            'massaging back', 'mowing lawn', 'opening bottle', 'playing accordion', 'playing badminton',
            'playing basketball', 'playing didgeridoo', 'playing ice hockey', 'playing keyboard', 'playing ukulele',
            'playing xylophone', 'presenting weather forecast', 'punching bag', 'pushing cart', 'reading book',
            'riding unicycle', 'shaking head', 'sharpening pencil', 'shaving head', 'shot put', 'shuffling cards',
            'slacklining', 'sled dog racing', 'snowboarding', 'somersaulting', 'squat', 'surfing crowd', 'trapezing',
            'using computer', 'washing dishes', 'washing hands', 'water skiing', 'waxing legs', 'weaving basket',
        ],
        val=[
            'baking cookies', 'crossing river', 'dunking basketball', 'feeding fish', 'flying kite', 'high kick',
            'javelin throw', 'playing trombone', 'scuba diving', 'skateboarding', 'ski jumping',
            'trimming or shaving beard',
        ],
        test=[
            'blasting sand', 'busking', 'cutting watermelon', 'dancing ballet', 'dancing charleston', 'dancing macarena',
            'diving cliff', 'filling eyebrows', 'folding paper', 'hula hooping', 'hurling (sport)', 'ice skating',
            'paragliding', 'playing drums', 'playing monopoly', 'playing trumpet', 'pushing car', 'riding elephant',
            'shearing sheep', 'side kick', 'stretching arm', 'tap dancing', 'throwing axe', 'unboxing',
        ],
    ),
    fetch='''Kinetics-400: https://github.com/cvdfoundation/kinetics-dataset. Expected:
  data/kinetics/                videos, in any folders: YouTube id, with or without times, as the name
  data/kinetics_lists/          trainlist03.txt, vallist03.txt, testlist03.txt: splits/kinetics_CMN of
                                https://github.com/tobyperrett/trx; CLIP-FSAR's lists do too
Elsewhere: --data_root=... --annotations=...; --annotations=None takes every video of a folder per class.''',
)
