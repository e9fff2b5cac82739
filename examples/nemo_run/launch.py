"""Alignment and then fine-tuning of gpt-oss-20B-Vision as an experiment of NeMo-Run, on SLURM or on this machine.

python examples/nemo_run/launch.py --site site.yaml            # submits a job
python examples/nemo_run/launch.py --site site.yaml --dry-run  # prints the batch script
python examples/nemo_run/launch.py --local                     # the tiny recipes, here
"""

import argparse

import nemo_run as run

from gpt_oss_vision.recipes.launch.nemo_run import script, slurm_executor


def main() -> None:
    """Build the experiment of the command line, and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--site", help="the site file of `gpt-oss-vision launch`")
    where.add_argument("--local", action="store_true", help="train the tiny recipes on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as of `gpt-oss-vision train`")
    options = parser.parse_args()

    size = "tiny" if options.local else "20b"
    executor = run.LocalExecutor() if options.local else slurm_executor(options.site)
    stages = f"gpt_oss_vision_{size}_align,gpt_oss_vision_{size}_sft"
    with run.Experiment("gpt-oss-vision") as experiment:
        experiment.add(script(stages, *options.settings, executor=executor), executor=executor, name="train")
        if options.dry_run:
            experiment.dryrun()
        else:
            experiment.run(tail_logs=options.local)


if __name__ == "__main__":
    main()
