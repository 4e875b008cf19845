"""Erase a concept, attack the result, judge the pictures: ``python run.py eraser=esd pruning=on attack=unlearndiff``."""

import os

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.errors import one_sentence


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> str:
    """Run one job of the composed config; returns the path of its summary."""
    with one_sentence():
        from pathlib import Path

        from experiments.config import build

        hydra_config = HydraConfig.get()
        job = build(config, hydra_config.runtime.choices)

        from experiments.job import run_job

        return str(run_job(job, Path(hydra_config.runtime.output_dir)))


if __name__ == "__main__":
    # Hydra would print its own text for its errors; they are told in one sentence with all the others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_sentence():
        main()
