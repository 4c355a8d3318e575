"""Starts the processes of one study as tasks of Ray: `ray_study.py --processes 8 -- --out DIR`.

What stands after `--` are the options of `jdrop`. All nodes must have `jdrop`, and must see the
folder of the run. If a node is lost, give the same command again: the run goes on.
"""

import argparse
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(num_cpus=0)
def find_address() -> str:
    """A free port on the node of this task, where the processes meet."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


@ray.remote(max_retries=0)
def run_process(command: list[str]) -> int:
    """Runs a process on this node, with the GPUs that Ray gives it, and returns its exit code."""
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Starts all processes, and returns the largest of their exit codes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--cpus", type=float, default=1, help="of each process")
    parser.add_argument("--gpus", type=float, default=0, help="of each process")
    parser.add_argument("options", nargs="*", help="of jdrop, after --")
    arguments = parser.parse_args()
    ray.init()
    # All or none: processes wait until the others have started.
    resources = {"CPU": arguments.cpus, "GPU": arguments.gpus}
    group = placement_group([resources] * arguments.processes)
    ray.get(group.ready())
    bundles = [
        PlacementGroupSchedulingStrategy(group, index) for index in range(arguments.processes)
    ]
    coordinator = ray.get(find_address.options(scheduling_strategy=bundles[0]).remote())
    shared = ["--coordinator", coordinator, "--num-processes", str(arguments.processes)]
    codes = [
        run_process.options(
            num_cpus=arguments.cpus, num_gpus=arguments.gpus, scheduling_strategy=bundle
        ).remote(["jdrop", *arguments.options, *shared, "--process-id", str(index)])
        for index, bundle in enumerate(bundles)
    ]
    return max(ray.get(codes))


if __name__ == "__main__":
    sys.exit(main())
