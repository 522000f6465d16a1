"""The training stages' choice of a network's size."""

from asr_kd.model import ModelShape
from asr_kd.networks import network_shape
from asr_kd.settings import make_settings


def test_only_soft_targets_change_the_students_dropout() -> None:
    settings = make_settings({"output_folder": "o", "synthetic_minutes": {"train": 1}, "dropout": 0.2, "student_dropout": 0.0, "hidden_layers": 3,
                              "hidden_units": 64, "student_hidden_units": 32, "num_mels": 40})
    assert network_shape(settings, 100) == ModelShape(1040, 3, 64, 100, 0.2)
    assert network_shape(settings, 100, student=True, soft=True) == ModelShape(1040, 3, 32, 100, 0.0)
    assert network_shape(settings, 100, student=True) == ModelShape(1040, 3, 32, 100, 0.2)  # the control
