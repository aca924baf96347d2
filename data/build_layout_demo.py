"""Make data/imagenet64_layout_demo.zip again: emoji in the layout of EDM's and DMD2's ImageNet-64
zip, for tests of the layout only.

    python data/build_layout_demo.py [--out x.zip]     # needs data/cache/emoji64.npz from build_emoji.py

Which emoji resembles which ImageNet class was decided by hand; it is the table below. Every fourth
of their pictures is taken (a class has four
at least), so that the file stays small."""
import argparse, io, json, os, sys, zipfile
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))

import torch
from dmd2_nb.grids import pil
from dmd2_nb.images import emoji64

classes = {  # ImageNet id: emoji
    2: 'shark',
    71: 'scorpion',
    84: 'peacock',
    105: 'koala',
    113: 'snail',
    119: 'crab',
    122: 'lobster',
    130: 'flamingo',
    147: 'whale2',
    288: 'leopard',
    292: 'tiger2',
    301: 'ladybug',
    304: 'beetle',
    308: 'fly',
    309: 'bee',
    310: 'ant',
    312: 'cricket',
    314: 'cockroach',
    337: 'beaver',
    340: 'zebra_face',
    341: 'pig2',
    344: 'hippopotamus',
    348: 'ram',
    354: 'dromedary_camel camel',
    360: 'otter',
    361: 'skunk',
    362: 'badger',
    364: 'sloth',
    365: 'orangutan',
    366: 'gorilla',
    388: 'panda_face',
    398: 'abacus',
    401: 'accordion',
    402: 'guitar',
    404: 'airplane',
    407: 'ambulance',
    414: 'school_satchel',
    417: 'balloon',
    429: 'baseball',
    430: 'basketball',
    435: 'bathtub',
    445: 'bikini',
    456: 'bow_and_arrow',
    462: 'broom',
    463: 'bucket',
    466: 'bullettrain_side',
    468: 'taxi',
    470: 'candle',
    476: 'carousel_horse',
    483: 'european_castle',
    497: 'church',
    504: 'coffee',
    508: 'keyboard',
    515: 'tophat',
    541: 'drum_with_drumsticks long_drum',
    555: 'fire_engine',
    562: 'fountain',
    587: 'hammer',
    604: 'hourglass',
    608: 'jeans',
    614: 'kimono',
    629: 'lipstick',
    632: 'loudspeaker',
    637: 'mailbox',
    650: 'microphone',
    654: 'minibus',
    657: 'rocket',
    668: 'mosque',
    670: 'motor_scooter',
    701: 'parachute',
    717: 'pickup_truck',
    731: 'plunger',
    734: 'police_car',
    742: 'printer',
    768: 'rugby_football',
    772: 'safety_pin',
    774: 'sandal',
    776: 'saxophone',
    780: 'boat',
    783: 'nut_and_bolt',
    784: 'screwdriver',
    787: 'shield',
    790: 'basket',
    791: 'shopping_trolley',
    805: 'soccer',
    815: 'spider_web',
    820: 'steam_locomotive',
    826: 'stopwatch',
    837: 'sunglasses dark_sunglasses',
    845: 'syringe',
    849: 'teapot',
    851: 'tv',
    852: 'tennis',
    861: 'toilet',
    866: 'tractor',
    874: 'trolleybus',
    879: 'umbrella',
    889: 'violin',
    890: 'volleyball',
    906: 'necktie',
    920: 'traffic_light vertical_traffic_light',
    928: 'ice_cream',
    931: 'bagel',
    932: 'pretzel',
    933: 'hamburger',
    934: 'hotdog',
    937: 'broccoli',
    943: 'cucumber',
    945: 'bell_pepper',
    947: 'mushroom',
    948: 'green_apple',
    949: 'strawberry',
    950: 'tangerine',
    951: 'lemon',
    953: 'pineapple',
    954: 'banana',
    963: 'pizza',
    965: 'burrito',
    980: 'volcano',
    987: 'corn',
}

ap = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
ap.add_argument('--out', type=Path, default=here/'imagenet64_layout_demo.zip')
a = ap.parse_args()
data, labels, when, every, seen = emoji64(), [], (1980, 1, 1, 0, 0, 0), 4, 0
tmp = a.out.with_name(a.out.name+'.tmp')
with zipfile.ZipFile(tmp, 'w', zipfile.ZIP_STORED) as z:
    for y, names in classes.items():
        ids = torch.tensor([data.concept_names.index(n) for n in names.split()])
        for i in torch.isin(data.concepts, ids).nonzero()[:, 0]:
            seen += 1
            if seen % every != 1: continue
            name, f = f'{len(labels)//1000:05d}/img{len(labels):08d}.png', io.BytesIO()
            pil(data.images[i]).save(f, 'png')
            z.writestr(zipfile.ZipInfo(name, when), f.getvalue())
            labels.append([name, y])
    z.writestr(zipfile.ZipInfo('dataset.json', when), json.dumps(dict(labels=labels)))
os.replace(tmp, a.out)
print(f'{a.out.name}: {len(labels)} images of {len(classes)} classes')
