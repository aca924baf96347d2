"All settings are in settings.ini; edit there, not here"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
name = cfg['lib_name']

extras = {
    k.removesuffix('_requirements'): v.split()
    for k, v in cfg.items()
    if k.endswith('_requirements')
}
extras['all'] = sorted({r for e in cfg['all_extras'].split() for r in extras[e]})
readme = here/'README.md'

class BuildPy(build_py):
    "data/ is no code: the scripts that rebuild the sets stay in the checkout"
    def find_package_modules(self, package, package_dir):
        return (
            [] if package == f'{name}.data' else super().find_package_modules(package, package_dir)
        )

setup(
    name=name,
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    license=cfg['license'],
    python_requires=f">={cfg['min_python']}",
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    # data/ stands beside the package in a checkout and inside it in a wheel
    packages=find_packages(include=[name, f'{name}.*']) + [f'{name}.data'],
    package_dir={name: name, f'{name}.data': 'data'},
    package_data={f'{name}.data': cfg['data_files'].split()},
    include_package_data=False,
    zip_safe=False,
    cmdclass=dict(build_py=BuildPy),
    entry_points=dict(
        nbdev=[f'{name}={name}._modidx:d'], console_scripts=cfg['console_scripts'].split()
    ),
)
