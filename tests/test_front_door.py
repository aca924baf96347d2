"`from dmd2_nb import ...`: the nouns of the package, nothing imported before they are asked for"
import subprocess, sys

import pytest


def test_names_and_lightness(root):
    "The root is light; its names are the modules' own; a wrong name is an AttributeError"
    code = (
        "import sys, dmd2_nb\n"
        "assert 'torch' not in sys.modules and 'load_generator' in dir(dmd2_nb)\n"
        "from dmd2_nb import load_generator, DMD2, DMD2Config, FewStepGenerator\n"
        "import dmd2_nb.train, dmd2_nb.distill, dmd2_nb.generator\n"
        "assert DMD2 is dmd2_nb.distill.DMD2 and load_generator is dmd2_nb.generator.load_generator\n"
        "assert callable(dmd2_nb.train.train)\n"  # the module is not hidden by a function of its name
        "try: dmd2_nb.load_generatr\n"
        "except AttributeError as e: assert 'load_generatr' in str(e)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    r = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert not r.returncode, r.stderr


def test_one_rule_for_names(tmp_path, monkeypatch):
    "A run by its name, its folder and its file are one generator; what is none says what is near"
    import torch
    from dmd2_nb import load_generator
    from dmd2_nb.jobs import open_model
    from dmd2_nb.weights import find_weights
    g = load_generator('fashion16_1step')
    monkeypatch.chdir(tmp_path)
    run = g.save_pretrained(tmp_path/'runs'/'mine-1')
    want = g.sample(2, 'bag', seed=3)
    for name in ('mine-1', 'runs/mine-1', run, run/'generator.safetensors'):
        assert torch.equal(load_generator(name).sample(2, 'bag', seed=3), want)
        assert torch.equal(open_model(name)[1].sample(2, 'bag', seed=3), want)
    with pytest.raises(FileNotFoundError, match='did you mean mine-1'): find_weights('mine-2')
    with pytest.raises(FileNotFoundError, match='runs/mine-2 is missing'): find_weights('runs/mine-2')
    with pytest.raises(FileNotFoundError, match='neither generator.safetensors nor teacher'):
        find_weights(tmp_path)


def test_hub(tmp_path, monkeypatch):
    "user/name asks the hub for the generator, and for the teacher where there is none"
    import huggingface_hub
    from dmd2_nb.weights import find_weights
    asked = []
    def download(repo, file):
        asked.append((repo, file))
        if file == 'generator.safetensors': raise OSError('no such file')
        return str(tmp_path/file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    assert find_weights('somebody/pets') == tmp_path/'teacher.safetensors'
    assert asked == [('somebody/pets', f'{k}.safetensors') for k in ('generator', 'teacher')]
    with pytest.raises(FileNotFoundError, match='the hub does not give it .*no such file'):
        find_weights('somebody/pets', ('generator',))
