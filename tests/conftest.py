import keras
import pytest


@pytest.fixture(autouse=True)
def _same_start():
    """Each test starts from one seed and leaves the dtype policy as it found it."""
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(before)
