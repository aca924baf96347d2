"What CI leaves to the night: `NIGHTLY=1 pytest tests` runs it"
import os

import pytest

on = bool(os.environ.get('NIGHTLY'))
nightly = pytest.mark.skipif(not on, reason='takes minutes: set NIGHTLY=1')
