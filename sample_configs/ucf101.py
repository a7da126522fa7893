"""UCF101, ARN's classes. Recipe: thesis, Table 4.9."""

config = dict(
    dataset='ucf101',
    data_root='data/ucf101',
    lr=1e-05,
    max_iters=2000,
    vba=dict(temporal_adapter=False, cross_video=False),
    augment='randaug',
    # as published for 1-shot, where the backbone trained along at the same rate: --finetune=<lr>
    hyrsm=dict(lr=5e-5, weight_decay=1e-3, max_iters=625, warmup_iters=175, meta_batch=16, shot=1, queries=7,
               auxiliary=0.15, drops={350: 0.5, 525: 0.1}),
    clip_fsar=dict(lr=2e-6, weight_decay=1e-3, max_iters=750, warmup_iters=150, meta_batch=16, shot=1, queries=5,
                   video_text=1.5, drops={300: 0.1, 450: 0.01}),
    norm='imagenet',
    splits=dict(
        train=[
            'ApplyEyeMakeup', 'Archery', 'BabyCrawling', 'BalanceBeam', 'BandMarching', 'BaseballPitch', 'Basketball',
            'BasketballDunk', 'BenchPress', 'Biking', 'Billiards', 'BlowDryHair', 'BodyWeightSquats', 'Bowling',
            'BoxingPunchingBag', 'BoxingSpeedBag', 'BreastStroke', 'BrushingTeeth', 'CricketBowling', 'Drumming', 'Fencing',
            'FieldHockeyPenalty', 'FrisbeeCatch', 'FrontCrawl', 'Haircut', 'Hammering', 'HeadMassage', 'HulaHoop',
            'JavelinThrow', 'JugglingBalls', 'JumpingJack', 'Kayaking', 'Knitting', 'LongJump', 'Lunges', 'MilitaryParade',
            'Mixing', 'MoppingFloor', 'Nunchucks', 'ParallelBars', 'PizzaTossing', 'PlayingCello', 'PlayingDhol',
            'PlayingFlute', 'PlayingPiano', 'PlayingSitar', 'PlayingTabla', 'PlayingViolin', 'PoleVault', 'PullUps',
            'PushUps', 'Rafting', 'RopeClimbing', 'Rowing', 'ShavingBeard', 'Skijet', 'SoccerJuggling', 'SoccerPenalty',
            'SumoWrestling', 'Swing', 'TableTennisShot', 'TaiChi', 'ThrowDiscus', 'TrampolineJumping', 'Typing',
            'UnevenBars', 'WalkingWithDog', 'WallPushups', 'WritingOnBoard', 'YoYo',
        ],
        val=[
            'ApplyLipstick', 'CricketShot', 'HammerThrow', 'HandstandPushups', 'HighJump', 'HorseRiding', 'PlayingDaf',
            'PlayingGuitar', 'Shotput', 'SkateBoarding',
        ],
        test=[
            'BlowingCandles', 'CleanAndJerk', 'CliffDiving', 'CuttingInKitchen', 'Diving', 'FloorGymnastics', 'GolfSwing',
            'HandstandWalking', 'HorseRace', 'IceDancing', 'JumpRope', 'PommelHorse', 'Punch', 'RockClimbingIndoor',
            'SalsaSpin', 'Skiing', 'SkyDiving', 'StillRings', 'Surfing', 'TennisSwing', 'VolleyballSpiking',
        ],
    ),
    fetch='''UCF101: https://www.crcv.ucf.edu/data/UCF101.php. Expected:
  data/ucf101/<class>/*.avi     the videos, unpacked; no list is needed
Elsewhere: --data_root=...''',
)
