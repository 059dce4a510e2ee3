"""examples/slurm: files that start a run on several nodes."""

import os
import shlex
import stat
import subprocess

from accelerate.commands.config.config_args import load_config_from_file
from scripts import ROOT

from askd_hf.arguments.parser import parse_args
from askd_hf.commands.options import options_of

SLURM = ROOT / "examples" / "slurm"


def test_accelerate_reads_the_configuration():
    config = load_config_from_file(str(SLURM / "accelerate.yaml"))
    assert (config.num_machines, config.num_processes, config.distributed_type.value) == (2, 16, "MULTI_GPU")


def test_the_job_starts_a_launcher_per_node_and_resumes(tmp_path):
    """srun, scontrol and accelerate are replaced by scripts that print what they get."""
    programs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "accelerate": 'echo "$@"',
    }
    for name, text in programs.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_JOB_NODELIST="node[7-8]")
    command = ["bash", str(SLURM / "distill.sbatch")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout)
    assert words[:3] == ["launch", "--config_file", "examples/slurm/accelerate.yaml"]
    assert words[3:9] == ["--machine_rank", "1", "--main_process_ip", "node7", "--main_process_port", "29500"]
    assert words[9:12] == ["-m", "askd_hf.commands.main", "distill"]
    *_, config = parse_args(options_of("distill"), words[12:])
    assert config.resume_from_checkpoint == "auto"
    assert config.output_dir == "runs/large-v3"
