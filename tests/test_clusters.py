"""The recipes for clusters parse, and their parts fit together."""

import re
import subprocess
from pathlib import Path

import yaml

from jdrop.study.cli import compare_command

CLUSTERS = Path(__file__).parent.parent / "scripts" / "clusters"


def test_the_job_of_slurm_is_a_script():
    subprocess.run(["bash", "-n", CLUSTERS / "slurm.sbatch"], check=True)


def test_the_pods_of_kubernetes_form_one_indexed_job():
    account, *_, job_set = yaml.safe_load_all((CLUSTERS / "jobset.yaml").read_text())
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    # JAX takes the count of processes from the one and their indices from the other.
    assert spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert volume["name"] == container["volumeMounts"][0]["name"]


def test_ray_gives_the_command_options_that_it_has():
    options = {name for option in compare_command.params for name in option.opts}
    source = (CLUSTERS / "ray_study.py").read_text()
    compile(source, "ray_study.py", "exec")
    of_ray = {"--processes", "--cpus", "--gpus"}
    given = {*re.findall(r'"(--[a-z-]+)"', source)} - of_ray
    assert given == {"--coordinator", "--num-processes", "--process-id"}
    assert given <= options
