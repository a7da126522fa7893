"""Tests of data.py: the lists that people have, the check before training, frames kept on disk, contact sheet."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint
import data
import decode
import reader
from config import DEFAULTS, load_config
from make_clips import picture, write_clip, write_folder
from tools import check

ROOT = pathlib.Path(data.__file__).parent

# Videos of each class in the full lists
DIVING48 = [295, 156, 52, 290, 54, 508, 181, 964, 478, 214, 89, 161, 449, 56, 104, 724, 87, 370, 82, 721, 179, 741, 407, 64,
            564, 62, 1122, 289, 377, 251, 0, 771, 104, 607, 670, 1087, 427, 73, 93, 50, 50, 170, 133, 415, 585, 616, 979, 76]
GYM99 = [73, 558, 487, 176, 133, 93, 404, 188, 530, 178, 271, 116, 102, 96, 123, 506, 145, 152, 148, 70, 102, 191, 190, 69, 205,
         195, 107, 129, 273, 67, 224, 198, 207, 133, 351, 413, 126, 255, 485, 85, 577, 232, 89, 809, 159, 87, 352, 796, 78, 112,
         281, 158, 306, 143, 83, 565, 96, 92, 256, 672, 278, 287, 547, 329, 666, 86, 296, 1138, 673, 156, 77, 264, 85, 94, 391,
         187, 1031, 163, 459, 1189, 110, 118, 102, 185, 145, 164, 228, 136, 374, 453, 145, 325, 206, 88, 1035, 1601, 384, 101,
         212]
# What the full lists hold: `VBA_LISTS=folder pytest tests/test_data_formats.py` counts them, where a folder of them is at hand
COUNTS = dict(
    kinetics=(6400, 1200, 2400), ssv2_small=(6400, 1200, 2400), ssv2_full=(67013, 1926, 2857), ucf101=(9154, 1421, 2745),
    hmdb51=(4280, 1194, 1292), diving48=(10789, 2714, 3494), gym99=(16867, 5011, 7127))
FULL = [('kinetics', 'fewshot_lists/trx_kinetics_CMN'), ('kinetics', 'fewshot_lists/clipfsar_kinetics100'),
        ('ssv2_small', 'fewshot_lists/trx_ssv2_CMN'), ('ssv2_small', 'fewshot_lists/clipfsar_ssv2_small'),
        ('ssv2_full', 'fewshot_lists/trx_ssv2_OTAM'), ('ssv2_full', 'fewshot_lists/clipfsar_ssv2_full'),
        ('ucf101', 'fewshot_lists/trx_ucf_ARN'), ('ucf101', 'fewshot_lists/clipfsar_ucf101'), ('ucf101', 'ucf101'),
        ('hmdb51', 'fewshot_lists/trx_hmdb_ARN'), ('hmdb51', 'fewshot_lists/clipfsar_hmdb51'),
        ('diving48', 'diving48'), ('gym99', 'gym99')]


def listed(name, annotations, root):
    """The numbers of videos that the lists give a sample config."""
    config = load_config([str(ROOT / 'sample_configs' / f'{name}.py'), f'--data_root={root}'])
    config['annotations'] = annotations if isinstance(annotations, list) else str(annotations)
    return tuple(len(rows) for _, rows in data.list_videos(config).values())


@pytest.mark.skipif('VBA_LISTS' not in os.environ, reason='set VBA_LISTS to a folder with the full lists')
@pytest.mark.parametrize('name, folder', FULL)
def test_counts_of_the_full_lists(name, folder, tmp_path):
    assert listed(name, os.path.join(os.environ['VBA_LISTS'], folder), tmp_path) == COUNTS[name]


def test_counts_by_id_are_those_of_the_thesis(tmp_path):
    items = [dict(vid_name=f'v_{label:02}_{i:05}', label=label, start_frame=0, end_frame=50)
             for label, count in enumerate(DIVING48) for i in range(count)]
    (tmp_path / 'd.json').write_text(json.dumps(items))
    (tmp_path / 'g.txt').write_text(''.join(f'A0xAXXysHUo_E_00{label:04}_002237_A_{i:04}_0036 {label}\n'
                                            for label, count in enumerate(GYM99) for i in range(count)))
    assert listed('diving48', tmp_path / 'd.json', tmp_path) == COUNTS['diving48']
    assert listed('gym99', tmp_path / 'g.txt', tmp_path) == COUNTS['gym99']


# ---- Formats, each on a few lines of the real files

@pytest.fixture
def disk(tmp_path):
    """function: names of files that exist (empty) and lists -> function: splits -> {class: [path on the disk or None, ...]}."""
    def make(videos, lists):
        for name in videos:
            path = tmp_path / 'root' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / 'root').mkdir(exist_ok=True)
        for name, text in lists.items():
            (tmp_path / name).write_bytes(text.encode())

        def read(**splits):
            config = dict(DEFAULTS, data_root=str(tmp_path / 'root'), annotations=[str(tmp_path / name) for name in lists],
                          splits=splits)
            found = {}
            for classes, rows in data.list_videos(config).values():
                for label, _, video in rows:
                    found.setdefault(classes[label], []).append(
                        video and (os.path.relpath(video.path, config['data_root']), *video[1:3]))
            return found

        return read
    return make


def test_diving48(disk):
    read = disk(['rgb/-mmq0PT-u8k_00155.mp4', 'rgb/8qRmKunCjtY_00016.mp4'], {
        'Diving48_V2_train.json': json.dumps([
            dict(vid_name='-mmq0PT-u8k_00155', label=0, start_frame=0, end_frame=48),
            dict(vid_name='-mmq0PT-u8k_00156', label=1, start_frame=0, end_frame=70)]),
        'Diving48_V2_test.json': json.dumps([dict(vid_name='8qRmKunCjtY_00016', label=0, start_frame=3, end_frame=78)]),
        'Diving48_vocab.json': json.dumps([['Back', '15som', '05Twis', 'FREE'], ['Back', '15som', '15Twis', 'FREE']])})
    assert read(train=[0], val=[1]) == {
        '0 Back 15som 05Twis FREE': [('rgb/-mmq0PT-u8k_00155.mp4', 0, 48), ('rgb/8qRmKunCjtY_00016.mp4', 3, 78)],
        '1 Back 15som 15Twis FREE': [None]}
    with pytest.raises(SystemExit, match='Class 30 of split train has no video'):
        read(train=[30])


def test_gym99(disk):
    read = disk(['a/A0xAXXysHUo_E_002184_002237_A_0035_0036.mp4', 'AZ4wWG6Rcak_E_003643_003675_A_0024_0026/0001.jpg'], {
        'gym99_train.txt': 'A0xAXXysHUo_E_002184_002237_A_0035_0036 93\nAZ4wWG6Rcak_E_003643_003675_A_0024_0026 77\n',
        'gym99_val.txt': '0LtLS9wROrk_E_002407_002435_A_0003_0005 77\n',
        'gym99_categories.txt': 'Clabel:  77; set:  4; Glabel: 1; (UB) pike sole circle backward with 1 turn to handstand\n'
                                'Clabel:  93; set:  4; Glabel: 2; (UB) giant circle backward\n'})
    assert read(train=[93], test=[77]) == {
        '93 giant circle backward': [('a/A0xAXXysHUo_E_002184_002237_A_0035_0036.mp4', None, None)],
        '77 pike sole circle backward with 1 turn to handstand': [
            None, ('AZ4wWG6Rcak_E_003643_003675_A_0024_0026', None, None)]}


def test_something_something(disk):
    read = disk(['20bn/74225.webm', '20bn/116154.webm'], {
        'labels.json': json.dumps({'Spinning something that quickly stops spinning': '0'}),
        'validation.json': json.dumps([
            dict(id='74225', label='spinning cube', template='Spinning [something] that quickly stops spinning'),
            dict(id='116154', label='showing box', template='Showing [something] on top of [something]'),
            dict(id='1', label='showing clay', template='Showing [something] on top of [something]')])})
    assert read(train=['spinning Something that quickly stops spinning'], val=['Showing something on top of something']) == {
        'spinning Something that quickly stops spinning': [('20bn/74225.webm', None, None)],
        'Showing something on top of something': [None, ('20bn/116154.webm', None, None)]}


def test_class_and_video(disk):
    """TRX's dialect; class names with spaces and commas; Kinetics names with and without times."""
    read = disk(['val/air_drumming/-VtLx-mcPds.mp4', 'train/airDrumming/-eGnPDG5Pxs_000053_000063.mkv', 'x/46768.webm'], {
        'list03.txt': 'air drumming/-VtLx-mcPds_000012_000022\nair drumming/-eGnPDG5Pxs_000053_000063\n'
                      'Lifting something up completely, then letting it drop down/46768\n'})
    assert read(train=['air drumming'], test=['Lifting something up completely then letting it drop down']) == {
        'air drumming': [('val/air_drumming/-VtLx-mcPds.mp4', None, None),
                         ('train/airDrumming/-eGnPDG5Pxs_000053_000063.mkv', None, None)],
        'Lifting something up completely then letting it drop down': [('x/46768.webm', None, None)]}


def test_split_and_class_number(disk):
    """CLIP-FSAR's dialect, and TRX's for SSv2: the number counts the split's classes."""
    read = disk(['fencing/a_fencing_0.avi', 'hit/a_fencing_0.avi', '78687.webm', '151/img_1.jpg'], {
        'test.txt': 'test0//videos/fencing/a_fencing_0.avi\ntest1//videos/hit/b.avi\n',
        'train.txt': 'train1/78687\ntrain0/151\n'})
    assert read(train=['x', 'y'], test=['fencing', 'hit']) == {
        'x': [('151', None, None)], 'y': [('78687.webm', None, None)], 'fencing': [('fencing/a_fencing_0.avi', None, None)],
        'hit': [None]}
    with pytest.raises(SystemExit, match='78687 is of class 1 of split train, but splits names 1 classes'):
        read(train=['x'], test=['fencing', 'hit'])


def test_ssv2_full_is_in_the_order_of_its_lists(disk):
    """Ids whose labels Something-Something itself publishes."""
    lines = {'test18/195025': 'Showing something next to something', 'test6/3': 'Picking something up',
             'test0/2': 'Approaching something with your camera', 'val10/1': 'Taking one of many similar things on the table',
             'val4/4': 'Pretending or failing to wipe something off of something',
             'train44/5': 'Showing a photo of something to the camera'}
    read = disk([], {'list.txt': '\n'.join(lines)})
    splits = load_config([str(ROOT / 'sample_configs/ssv2_full.py')])['splits']
    for line, name in lines.items():
        split, index = line.split('/')[0].rstrip('0123456789'), int(line.split('/')[0].lstrip('trainvles'))
        assert splits[split][index] == name
    with pytest.raises(SystemExit, match='has no video'):
        read(**splits)


def test_ucf101(disk):
    read = disk(['ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi', 'YoYo/v_YoYo_g01_c01.avi'], {
        'classInd.txt': '1 ApplyEyeMakeup\r\n2 YoYo\r\n',
        'trainlist01.txt': 'ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nYoYo/v_YoYo_g09_c02.avi 2\n',
        'testlist01.txt': 'ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\nYoYo/v_YoYo_g01_c01.avi\n'})
    assert read(train=['ApplyEyeMakeup'], val=['yo-yo']) == {
        'ApplyEyeMakeup': [None, ('ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi', None, None)],
        'yo-yo': [('YoYo/v_YoYo_g01_c01.avi', None, None), None]}


def test_hmdb51(disk):
    """The official split, a file a class; and lists that number the classes without naming them."""
    read = disk(['brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi', 'hug/Free_Hugs_hug_f_cm_np4_ba_med_2.avi'], {
        'brush_hair_test_split1.txt': 'April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \nother.avi 2 \n',
        'trainlist01.txt': 'Free_Hugs_hug_f_cm_np4_ba_med_2 19\nHow_to_do_a_Cartwheel_cartwheel_f_nm_np1_le_med_2 2\n'})
    assert read(train=['brush hair'], val=['hug']) == {
        'brush hair': [('brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi', None, None), None],
        'hug': [('hug/Free_Hugs_hug_f_cm_np4_ba_med_2.avi', None, None)]}
    read = disk([], {'trainlist01.txt': 'Nowhere_hug_f_cm_np4_ba_med_2 19\n'})
    with pytest.raises(SystemExit, match='no list gives names'):
        read(train=['hug'])


@pytest.mark.parametrize('between, head', [(' ', ''), ('\t', ''), (',', ''), (',', 'path,label\n')])
def test_path_and_label(disk, between, head):
    read = disk(['a b/my clip 1.mp4', 'c/2.webm'], {
        'list.txt': f'{head}a b/my clip 1.mp4{between}jump\nc/2{between}Roll-Over\n'})
    assert read(train=['jump', 'roll over']) == {
        'jump': [('a b/my clip 1.mp4', None, None)], 'roll over': [('c/2.webm', None, None)]}


@pytest.mark.parametrize('text', [
    'path,class,split\na/1.mp4,hug,train\na/gone.mp4,hug,training\nb/2.mp4,run fast,val\n',
    'class,path\nhug,a/1.mp4\nhug,a/gone.mp4\nrun fast,b/2.mp4\n', 'hug,1.mp4\nhug,gone.mp4\nrun fast,2.mp4\n',
    'category\tfile name\tsubset\nhug\ta/1.mp4\ttrain\nhug\ta/gone.mp4\ttrain\nrun fast\tb/2.mp4\tvalidation\n',
    'hug\t1\nhug\tgone\nrun fast\t2\n', 'a/gone.mp4,hug\na/1.mp4,hug\nb/2.mp4,run fast\n',
    'name,category\na/1.mp4,hug\na/gone.mp4,hug\nb/2.mp4,run fast\n'])
def test_columns_are_told_by_what_is_on_the_disk(disk, text, capsys):
    read = disk(['a/1.mp4', 'b/2.mp4'], {'list.csv': text})
    assert read(train=['hug'], val=['run fast']) == {
        'hug': [('a/1.mp4', None, None), None], 'run fast': [('b/2.mp4', None, None)]}
    out = capsys.readouterr().out
    assert '3 videos:' in out and "is of 'run fast'" in out


def test_a_list_tells_the_splits_of_classes_and_of_videos(disk, tmp_path):
    disk(['1.mp4', '2.mp4', '3.mp4'], {'list.csv': '1.mp4,hug,train\n2.mp4,run,train\n3.mp4,jump,val\n'})
    config = dict(DEFAULTS, data_root=str(tmp_path / 'root'), annotations=str(tmp_path / 'list.csv'))
    assert [classes for classes, _ in data.list_videos(config).values()] == [['hug', 'run'], ['jump'], []]
    (tmp_path / 'list.csv').write_text('1.mp4,hug,train\n2.mp4,run,train\n3.mp4,hug,val\n')
    with pytest.raises(SystemExit, match="class 'hug' stands in train and in val"):
        data.list_videos(config)
    listed = data.list_videos(dict(config, closed_set=True, holdout=dict(val=0.0, test=0.0)))
    assert [[name for _, name, _ in rows] for _, rows in listed.values()] == [['1.mp4', '2.mp4'], ['3.mp4'], [], []]


def test_a_class_name_with_a_comma_is_no_column(disk):
    read = disk(['x/46768.webm'], {'list.txt': 'Lifting something up, then letting it drop down/46768\n'})
    assert read(train=['Lifting something up then letting it drop down'])


def test_bad_lists_are_named(disk, tmp_path):
    for name, text, message in (('a.txt', 'just words\nand more/x y z/\n', 'a.txt is in none of the known formats'),
                                ('b.json', '[{"id": "1"}]', 'b.json.*no label'), ('c.json', '[{', 'c.json'),
                                ('d.txt', '', 'd.txt'), ('e.json', '[]', 'e.json'), ('f.json', '[3]', 'f.json')):
        with pytest.raises(SystemExit, match=message):
            disk([], {name: text})(train=['x'])
    config = dict(DEFAULTS, data_root=str(tmp_path), annotations=str(tmp_path / 'gone.txt'), fetch='Get it.')
    with pytest.raises(SystemExit, match='There is no .*gone.txt.\nGet it.'):
        data.load_splits(config)


def test_without_the_data_a_config_says_what_to_fetch():
    for path in (ROOT / 'sample_configs').glob('*.py'):
        config = load_config([str(path), '--data_root=/nowhere/at/all'])
        if not config['prepare']:
            with pytest.raises(SystemExit, match='There is no folder /nowhere/at/all.\n(.*http|Expected)'):
                data.load_splits(config)


# ---- The check

@pytest.fixture
def mixed(tmp_path):
    """Two classes with four good videos, a short, a cut, a broken and a listed but missing one; two small classes."""
    root = tmp_path / 'videos'
    lines = []
    for name, size in dict(left=(64, 48), right=(72, 48)).items():
        (root / name).mkdir(parents=True)
        for i in range(4):
            write_clip(root / name / f'{i}.mp4', frames=12 + i, size=size, options=dict(preset='ultrafast'))
        write_clip(root / name / 'short.mp4', frames=5, size=size, options=dict(preset='ultrafast'))
        path = write_clip(root / name / 'cut.avi', frames=40, size=size, codec='mpeg4')
        os.truncate(path, os.path.getsize(path) * 3 // 4)
        (root / name / 'broken.mp4').write_bytes(b'nothing ' + name.encode())
        lines += [f'{name}/{file}.mp4' for file in (0, 1, 2, 3, 'short', 'cut', 'broken', 'gone')]
    for name, size in dict(up=(64, 48), down=(72, 48), **{'in': (80, 48)}, out=(88, 48)).items():
        lines += [write_folder(root / name / str(i), 9, size)[len(str(root)) + 1:] for i in range(2)]
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    return dict(DEFAULTS, data_root=str(root), annotations=str(tmp_path / 'list.txt'),
                splits=dict(train=['left', 'right'], val=['up', 'down'], test=['in', 'out']), out_dir=str(tmp_path / 'out'),
                way=2, shot=2, queries=2, test_shots=[1], resize=48, device='cpu')


def test_the_check_knows_of_groups(mixed):
    """Two classes are enough for 2-way episodes, two groups of one are not."""
    mixed['splits']['test'] = [['in'], ['out']]
    with pytest.raises(SystemExit, match='cannot be trained: .*in 2 groups'):
        check.check(mixed)


def test_check(mixed, capsys, monkeypatch):
    check.check(mixed)
    out = capsys.readouterr().out
    row, = (line.split() for line in out.splitlines() if line.startswith('train  '))
    assert row[1:] == ['2', '16', '14', '2', '2', '2', '2'] and 'can be trained' in out
    bad = open(os.path.join(mixed['out_dir'], 'check.txt')).read().splitlines()
    assert len(bad) == 6 and all(any(word in line for line in bad) for word in ('cut short', 'gone.mp4', 'broken.mp4'))

    # a second check opens nothing; training uses the verdicts
    monkeypatch.setattr(reader.ClipReader, 'check', lambda self, videos: pytest.fail('opened again') if videos else [])
    check.check(mixed)
    assert out.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    splits = data.load_splits(mixed)
    assert '16 videos listed, 2 missing, 2 unreadable, 12 used' in capsys.readouterr().out
    assert [os.path.basename(video.path) for video in splits['train'].videos[:6]] == [
        '0.mp4', '1.mp4', '2.mp4', '3.mp4', 'cut.avi', 'short.mp4']

    # a file that changed is opened again, others not; half a line from a crash is no harm
    monkeypatch.undo()
    write_clip(os.path.join(mixed['data_root'], 'left', 'broken.mp4'), frames=20)
    with open(data.verdict_file(mixed), 'a') as file:
        file.write('\n[["half a li')
    opened = []
    real = reader.ClipReader.check
    monkeypatch.setattr(reader.ClipReader, 'check', lambda self, videos: real(self, opened.extend(videos) or videos))
    check.check(mixed)
    assert [os.path.basename(video.path) for video in opened] == ['broken.mp4']
    assert len(data.load_splits(mixed)['train'].videos) == 13


def test_the_same_video_in_two_splits_is_named(mixed, capsys):
    """Copies under other names; not those of one class, nor others of the same size."""
    root = pathlib.Path(mixed['data_root'])
    for name in ('left', 'up'):  # a file twice in a class, and in another split
        (root / name / 'copy.mp4').write_bytes((root / 'left' / '0.mp4').read_bytes())
    (root / 'right' / 'other.mp4').write_bytes((root / 'left' / '1.mp4').read_bytes()[:-1] + b'x')
    (root / 'right' / 'another.mp4').write_bytes(b'x' + (root / 'left' / '1.mp4').read_bytes()[1:])
    shutil.copytree(root / 'up' / '0', root / 'down' / 'copy')
    config = dict(mixed, annotations=None)
    check.check(config)
    out, lines = capsys.readouterr().out, open(os.path.join(mixed['out_dir'], 'check.txt')).read()
    found = check.find_twice(data.list_videos(config))
    assert [[os.path.relpath(path, root) for *_, path in places] for places in found] == [
        ['left/0.mp4', 'left/copy.mp4', 'up/copy.mp4'], ['up/0', 'up/1', 'down/copy']]
    assert '2 videos are there twice, in two classes or splits, such as' in out
    assert f'{root}/up/copy.mp4 (val, up)' in lines and 'left/1.mp4' not in lines


def test_a_link_to_nowhere_is_unreadable(mixed):
    os.symlink('/nowhere', os.path.join(mixed['data_root'], 'left', 'link.mp4'))
    config = dict(mixed, annotations=None)
    check.check(config)
    assert 'link.mp4' in open(os.path.join(mixed['out_dir'], 'check.txt')).read()
    assert not [video for video in data.load_splits(config)['train'].videos if 'link.mp4' in video.path]


def test_folders_that_cannot_be_read_are_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a' / 'clip').mkdir(parents=True)
    (tmp_path / 'a' / 'locked').mkdir()
    for name in ('1.mp4', 'clip/1.jpg', 'locked/1.jpg'):
        (tmp_path / 'a' / name).touch()
    os.symlink(tmp_path, tmp_path / 'a' / 'above')
    os.symlink(tmp_path / 'a' / 'loop', tmp_path / 'a' / 'loop')
    scan = os.scandir

    def locked(path):  # root may read everything
        if path.endswith('locked'):
            raise PermissionError(13, 'Permission denied')
        return scan(path)

    monkeypatch.setattr(data.os, 'scandir', locked)
    assert data.list_folders(str(tmp_path)) == [('a', decode.Video(str(tmp_path / 'a' / name))) for name in ('1.mp4', 'clip')]
    err = capsys.readouterr().err
    assert err.count('left out') == 2 and 'locked: Permission denied' in err and 'above: it links to a folder above it' in err
    with pytest.raises(SystemExit, match='Cannot read the folder .*nowhere'):
        data.list_folders(str(tmp_path / 'nowhere'))


def test_check_tells_whether_training_can_start(mixed):
    with pytest.raises(SystemExit, match="cannot be trained: Class 'left' of split train has 6 videos"):
        check.check(dict(mixed, shot=5))
    check.check(dict(mixed, shot=5, lower=True))  # as the verdicts are kept, this opens nothing


def test_check_as_a_command(mixed, tmp_path):
    path = tmp_path / 'config.py'
    keys = ('data_root', 'annotations', 'splits', 'out_dir', 'way', 'shot', 'queries', 'test_shots', 'resize')
    path.write_text('config = dict(' + ', '.join(f'{key}={mixed[key]!r}' for key in keys) + ')')
    for shot, status in ((2, 0), (5, 1)):
        run = subprocess.run([sys.executable, ROOT / 'data.py', path, f'--shot={shot}'], cwd=tmp_path,
                             capture_output=True, text=True)
        assert run.returncode == status and 'Traceback' not in run.stderr, run.stderr
    assert 'cannot be trained' in run.stderr


def test_a_video_that_vanishes_after_the_check_is_replaced(mixed, capsys):
    check.check(mixed)
    split = data.load_splits(mixed)['train']
    os.remove(split.videos[0].path)
    clips = reader.ClipReader(dict(mixed, workers=0), 32)
    (_, indices), = clips.stream(split, [(0, [0, 1])], True)
    assert indices[0] not in (0, 1) and indices[1] == 1 and '0.mp4: No such file' in capsys.readouterr().err


def test_lowered_episodes(capsys):
    def split(classes, videos):
        labels = np.repeat(np.arange(classes), videos)
        return data.Split('test', [str(i) for i in range(classes)], [decode.Video(str(i)) for i in labels], labels)

    config = dict(DEFAULTS, lower=True)
    assert data.fit_episode(config, split(5, 10), 5, 5, 5) == (5, 5, 5) and capsys.readouterr().out == ''
    assert data.fit_episode(config, split(3, 4), 5, 5, 5) == (3, 3, 1)
    assert '3 classes, the smallest of 4 videos: episodes are 3-way 3-shot with 1 queries' in capsys.readouterr().out
    assert data.fit_episode(config, split(6, 4), 5, 1, 5) == (5, 1, 3)
    assert data.fit_episode(dict(config, lower=False), split(3, 4), 5, 5, 5) == (5, 5, 5)
    for small in (split(1, 9), split(4, 1)):
        with pytest.raises(SystemExit, match='too small'):
            data.fit_episode(config, small, 5, 1, 1)


# ---- Clips

def test_frames_on_disk(tmp_path):
    paths = [write_clip(tmp_path / f'{i}.mp4', frames=40, size=(96, 72)) for i in range(3)] + [write_folder(tmp_path / 'f', 9)]
    videos = [decode.Video(path) for path in paths]
    config = dict(DEFAULTS, resize=256, cache_dir=str(tmp_path / 'cache'), cache_frames=16)
    requests = [(video, seed) for video in videos for seed in (None, [1], [2])]

    def clips(**options):
        maker = reader.ClipMaker(dict(config, **options), 64)
        return maker, [maker.clip(*request) for request in requests]

    first, expected = clips()
    size = sum(file.stat().st_size for file in (tmp_path / 'cache').iterdir())
    again, got = clips()
    assert all(map(torch.equal, got, expected)) and len(again.store.index) == 8
    assert size == sum(file.stat().st_size for file in (tmp_path / 'cache').iterdir())  # nothing was written twice
    for path in paths[:3]:
        os.rename(path, path + '.away')
    with pytest.raises(decode.UnreadableVideo):
        again.clip(*requests[0])
    for path in paths[:3]:
        os.rename(path + '.away', path)

    # as good as direct decoding, whether it fits or not; another size or number of frames never reads these
    for other in (dict(cache_gb=0.0, cache_dir=str(tmp_path / 'none')), dict(cache_gb=1e-4, cache_dir=str(tmp_path / 'small'))):
        assert all(map(torch.equal, clips(**other)[1], expected))
    assert sum(file.stat().st_size for file in (tmp_path / 'small').iterdir()) < 110_000
    direct = [reader.ClipMaker(dict(config, cache_dir=None), 64).clip(video, None) for video in videos]
    error = np.mean([((a.float() - b.float()) ** 2).mean() for a, b in zip(direct, expected[::3])])
    assert 10 * np.log10(255 ** 2 / error) > 25  # these pictures are noise, JPEG's worst
    for options in (dict(resize=48), dict(cache_frames=12), dict(frames=4)):
        assert len(clips(**options)[0].store.index) > len(again.store.index)

    # half a line, frames cut off, frames gone: decoded again
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-40]), lambda file: file.unlink()):
        for file in sorted((tmp_path / 'cache').iterdir()):
            damage(file)
            assert all(map(torch.equal, clips()[1], expected))


def test_workers_share_frames_on_disk(tmp_path):
    (tmp_path / 'a').mkdir()
    for i in range(6):
        write_clip(tmp_path / 'a' / f'{i}.mp4', frames=20)
    config = dict(DEFAULTS, data_root=str(tmp_path), splits=dict(train=['a']), resize=48, cache_dir=str(tmp_path / 'c'),
                  device='cpu')
    split, results = data.load_splits(config)['train'], []
    for workers in (2, 1, 2, 0):
        clips = reader.ClipReader(dict(config, workers=workers), 32)
        results.append(next(clips.stream(split, [(0, range(6))], True))[0])
        clips.close()
    assert all(torch.equal(results[0], other) for other in results)
    lines = [line for file in (tmp_path / 'c').glob('*.index') for line in open(file)]
    assert len(lines) == 6


def test_jitter_is_one_draw_for_the_whole_clip():
    still = torch.from_numpy(picture(3)).permute(2, 0, 1).repeat(8, 1, 1, 1)
    clips = [reader.jitter(still, np.random.default_rng(seed)) for seed in range(10)]
    assert all(clip.dtype == torch.uint8 and clip.shape == still.shape and (clip == clip[:1]).all() for clip in clips)
    assert len({clip.numpy().tobytes() for clip in clips}) == 10
    grey = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    spread = [reader.jitter(grey, np.random.default_rng(seed)).float() for seed in range(10)]
    assert all((clip.amax(1) - clip.amin(1)).max() <= 1 for clip in spread)  # hue and saturation leave grey grey
    maker = reader.ClipMaker(dict(DEFAULTS, augment='randaug', resize=48), 32)
    assert maker.crop(np.repeat(picture(0)[None], 8, 0), np.random.default_rng(0)).shape == (8, 3, 32, 32)


def test_flipping_classes_that_name_a_side_warns(capsys):
    names = ['Pushing something from left to right', 'TurnLeft', 'spin counter-clockwise', 'bright light', 'copyright', 'cleft']
    reader.warn_of_sides(data.Split('train', names, [], np.zeros(0, np.int64)))
    err = capsys.readouterr().err
    assert '3 classes' in err and 'Pushing' in err and 'TurnLeft' in err and 'spin' in err and 'bright' not in err


def test_contact_sheet(mixed, tmp_path):
    """Of the demo's CLIP of 64 pixels: as large as what it sees, of frames decoded at 256/224 of that."""
    config = dict(mixed, annotations=None, splits=dict(train=['left'], test=['right', 'up']), flip=False, workers=0,
                  clip=os.path.join(ROOT, 'demo', 'tiny_clip.pt'), resize=None)
    check.contact_sheet(config, str(tmp_path / 'sheet.png'))
    sheet = decode.decode_image((tmp_path / 'sheet.png').read_bytes(), 10**6)
    assert sheet.shape == (6 * 64, 8 * 64, 3) and config['resize'] == 73
    maker = reader.ClipMaker(dict(config, resize=73), 64)
    for row, video in enumerate(('right/0.mp4', 'right/1.mp4', 'up/0', 'up/1'), 2):
        clip = maker.clip(decode.Video(os.path.join(config['data_root'], video)), None).numpy()
        assert np.array_equal(sheet[64 * row:64 * (row + 1)].reshape(64, 8, 64, 3), clip.transpose(2, 0, 3, 1))
    left = maker.clip(decode.Video(os.path.join(config['data_root'], 'left/0.mp4')), None).numpy()
    assert sheet[:128].std() > 20 and not np.array_equal(sheet[:64].reshape(64, 8, 64, 3), left.transpose(2, 0, 3, 1))


def test_frames_are_decoded_at_256_of_224_of_what_clip_sees(tmp_path):
    """A test clip is then the middle 7/8 of a frame, whatever the backbone; a size that is named stays."""
    clip = os.path.join(ROOT, 'demo', 'tiny_clip.pt')
    sizes = {}
    for options in ((), ('--image_size=224',), ('--resize=256',)):
        config = load_config([f'--clip={clip}', *options])
        checkpoint.load_clip(config)
        sizes[options] = config['resize']
    assert list(sizes.values()) == [73, 256, 256]
    frames = np.zeros((1, 73, 100, 3), np.uint8)
    frames[:, 4:68, 18:82] = 255  # 64 of 73, in the middle
    clip = reader.ClipMaker(dict(DEFAULTS, resize=73), 64).crop(frames, None)
    assert (clip == 255).all()
