"""Every experiment has a config that it reads, options that it explains, and a quick setting."""

from pathlib import Path

import pytest

from distattn_hf.experiments import EXPERIMENTS
from distattn_hf.experiments.run_experiment import describe, load_experiment, read_options

CONFIGS = Path("configs") / "experiments"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config(name):
    experiment = load_experiment(name)
    config = CONFIGS / f"{name}.yaml"
    assert f"distattn experiment {name} --config {config.as_posix()}" in config.read_text(encoding="utf-8")
    assert read_options(experiment, config, ()) != read_options(experiment, config, (), quick=True)
    for option in experiment.Options.__dataclass_fields__:
        assert option in (experiment.Options.__doc__ or ""), f"{name} does not explain {option}"
    assert describe(experiment).startswith(experiment.__doc__.strip()[:40])
