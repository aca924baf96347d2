"""Learn DMD2 and run it on one GPU

`from dmd2_nb import load_generator, DMD2, DMD2Config` is the front door. Nothing is imported before
one of these is asked for."""
__version__ = "0.2.0"
__all__ = ['DMD2', 'DMD2Config', 'FewStepGenerator', 'load_generator']
_homes = dict(
    DMD2='distill', DMD2Config='distill', FewStepGenerator='generator', load_generator='generator'
)


def __getattr__(name):
    "The name's module is imported at its first use"
    if name not in _homes: raise AttributeError(f"module 'dmd2_nb' has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f'dmd2_nb.{_homes[name]}'), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
