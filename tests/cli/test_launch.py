import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path("launch")
SCRIPTS = ["local_multiprocess.sh", "slurm.sbatch", "tpu_pod.sh"]


def run(*command, cwd=None, **environ):
    """Runs a launcher; its exit code, the lines of its output and of its complaints."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environ},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture
def stub(tmp_path):
    """Puts a shell script on PATH under a name; returns the PATH."""
    folder = tmp_path / "stubs"
    folder.mkdir()

    def put(name, text):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return f"{folder}:{os.environ['PATH']}"

    return put


class TestText:
    @pytest.mark.parametrize("name", SCRIPTS)
    @pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
    def test_shellcheck_has_nothing_to_say(self, name):
        assert run("shellcheck", LAUNCH / name) == (0, [], [])

    @pytest.mark.parametrize("name", [*SCRIPTS, "gke_jobset.yaml", "README.md"])
    def test_it_is_in_the_readme_and_the_configs_it_names_are_there(self, name):
        assert name in (LAUNCH / "README.md").read_text() or name == "README.md"
        for config in re.findall(r"configs/\w+\.py", (LAUNCH / name).read_text()):
            assert pathlib.Path(config).exists(), config


WORKER = """
import signal, sys, time
mode, *flags = sys.argv[1:]
process = int(flags[-1].removeprefix("--process_id="))
def told(*_):
    print("told", flush=True)
    sys.exit(0)
if mode == "waits":
    signal.signal(signal.SIGTERM, told)
print(*flags, flush=True)
print("complaint", file=sys.stderr, flush=True)
if mode == "fails" and process == 1:
    sys.exit(7)
if mode != "ends":
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        sys.exit(130)
"""


class TestLocalMultiprocess:
    @pytest.fixture
    def command(self, tmp_path):
        (tmp_path / "worker.py").write_text(WORKER)
        return [LAUNCH / "local_multiprocess.sh", 2, sys.executable, tmp_path / "worker.py"]

    def test_each_process_is_told_who_it_is_and_its_lines_are_marked(self, command):
        code, out, err = run(*command, "ends")
        assert code == 0
        first, second = sorted(out)
        match = re.fullmatch(
            r"\[0\] --coordinator=localhost:(\d+) --num_processes=2 --process_id=0", first
        )
        assert match, first
        assert second == f"[1]{first.removeprefix('[0]')[:-1]}1"
        assert sorted(err) == ["[0] complaint", "[1] complaint"]

    def test_one_that_fails_ends_all_with_its_code(self, command):
        code, _, _ = run(*command, "fails", GRACE="0.5")  # the other would outlast the test
        assert code == 7

    @pytest.fixture
    def _interruptible(self):
        """Children hear SIGINT, also of tests that run in a shell's background, which do not."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("_interruptible")
    @pytest.mark.parametrize(
        ("told", "code", "last"), [(signal.SIGTERM, 0, "told"), (signal.SIGINT, 130, None)]
    )
    def test_a_signal_reaches_all_and_their_last_words_are_heard(self, command, told, code, last):
        command = [str(part) for part in command]
        with subprocess.Popen(
            [*command, "waits"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            for _ in range(2):
                process.stdout.readline()
            process.send_signal(told)
            rest = sorted(process.stdout.read().split())
            assert process.wait(timeout=60) == code
        assert rest == (sorted(["[0]", "[1]", last, last]) if last else [])

    @pytest.mark.parametrize("arguments", [[], ["2"], ["none", "true"], ["2", "no-such-command"]])
    def test_what_cannot_be_run_is_told_how(self, arguments):
        code, out, (line,) = run(LAUNCH / "local_multiprocess.sh", *arguments)
        assert (code, out) == (2, [])
        assert line.startswith("usage: ")

    def test_when_it_is_killed_its_processes_end(self, stub, tmp_path):
        path = stub("enat", f"echo $$ >> {tmp_path}/pids; exec sleep 60")
        command = [LAUNCH / "local_multiprocess.sh", "2", "enat"]
        environ = {**os.environ, "PATH": path, "GRACE": "1"}

        def ids():
            file = tmp_path / "pids"
            return list(map(int, file.read_text().split())) if file.exists() else []

        with subprocess.Popen(command, env=environ) as launcher:
            while len(ids()) < 2:
                time.sleep(0.05)
            launcher.kill()
        for _ in range(100):
            there = [pid for pid in ids() if pathlib.Path(f"/proc/{pid}").exists()]
            if not there:
                break
            time.sleep(0.1)
        assert there == []

    def test_processes_of_the_command_line_meet_and_end_together(self):
        command = [sys.executable, "-m", "enat_jax", "train", "--config=nowhere.py"]
        code, out, err = run(LAUNCH / "local_multiprocess.sh", 2, *command, "--workdir=nowhere")
        assert (code, out) == (1, [])
        assert "[0] enat train: no config file 'nowhere.py'" in err


class TestSlurm:
    SBATCH = """
while [[ $1 == --* ]]; do shift; done
script=$1; shift
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=4100 SLURM_CPUS_PER_TASK=3
grep '^#SBATCH' "$script" | tr '\\n' ' ' >&2
exec bash "$script" "$@"
"""
    SRUN = """
[[ $1 == --kill-on-bad-exit=1 && $2 == --cpus-per-task=3 ]] || exit 9
shift 2
for k in 0 1; do
    SLURM_NTASKS=2 SLURM_PROCID=$k SLURM_LOCALID=0 SLURM_STEP_NODELIST=node[1-2] "$@" || exit
done
"""

    @pytest.fixture
    def sbatch(self, stub, tmp_path):
        """Submits the launcher from a folder whose environment's `enat` is a script."""
        stub("sbatch", self.SBATCH)
        path = stub("srun", self.SRUN)
        enat = tmp_path / ".venv/bin/enat"
        enat.parent.mkdir(parents=True)

        def submit(script, *words):
            enat.write_text(f"#!/bin/bash\n{script}\n")
            enat.chmod(0o755)
            command = ["sbatch", "--nodes=2", (LAUNCH / "slurm.sbatch").resolve(), *words]
            return run(*command, cwd=tmp_path, PATH=path)

        return submit

    def test_the_job_runs_the_folders_own_command_line_once_per_task(self, sbatch):
        echo = 'echo "$SLURM_PROCID of $SLURM_NTASKS"; printf "%s\\n" "$@"'
        code, out, (options,) = sbatch(echo, "train", "--workdir=/a b/run")
        assert code == 0
        words = ["train", "--workdir=/a b/run"]
        assert out == ["0 of 2", *words, "1 of 2", *words]
        given = [option.strip().removeprefix("--") for option in options.split("#SBATCH")[1:]]
        assert "ntasks-per-node=1" in given
        assert "signal=TERM@300" in given  # to the steps, not to the shell alone

    def test_a_task_that_fails_fails_the_job(self, sbatch):
        assert sbatch("exit 5", "train")[0] == 5


class TestTpuPod:
    GCLOUD = """
[[ "$1 $2 $3 $4 $5" == "compute tpus tpu-vm ssh pod" && $6 == --zone=us-west4-a ]] || exit 9
workers=${7#--worker=} command=${8#--command=}
[[ $# == 8 && $7 != "$workers" && $8 != "$command" ]] || exit 9
echo "on $workers"
cd "$HOME" && exec bash -c "$command"
"""

    @pytest.fixture
    def pod(self, stub, tmp_path):
        """Runs tpu_pod.sh where gcloud leads to a home folder on this machine."""
        (tmp_path / "enat_jax/.venv/bin").mkdir(parents=True)
        enat = tmp_path / "enat_jax/.venv/bin/enat"
        enat.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n[[ $1 == ends ]] || exec sleep 30\n')
        enat.chmod(0o755)
        environ = {"PATH": stub("gcloud", self.GCLOUD), "HOME": str(tmp_path),
                   "TPU": "pod", "ZONE": "us-west4-a"}  # fmt: skip
        yield lambda *words: run(LAUNCH / "tpu_pod.sh", *words, **environ)
        pid = tmp_path / "enat_jax/enat.pid"
        if pid.exists():
            subprocess.run(["kill", pid.read_text().strip()], stderr=subprocess.DEVNULL)

    @staticmethod
    def log_when(tmp_path, lines):
        log = tmp_path / "enat_jax/enat.log"
        for _ in range(200):
            if log.exists() and len(log.read_text().splitlines()) >= lines:
                break
            time.sleep(0.05)
        return log.read_text().splitlines()

    def test_start_runs_the_command_line_on_all_and_lets_it_outlive_the_connection(
        self, pod, tmp_path
    ):
        words = ["train", "--workdir=/mnt/a b", "--config.model.width=64", "it's $HOME"]
        assert pod("start", *words) == (0, ["on all"], [])
        assert self.log_when(tmp_path, 4) == words
        pid = int((tmp_path / "enat_jax/enat.pid").read_text())
        os.kill(pid, 0)
        assert os.getsid(pid) == pid
        assert pod("start", "train")[0] != 0  # one run at a time
        assert pod("stop") == (0, ["on all"], [])
        for _ in range(200):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it is still there")

    def test_what_is_missing_is_said(self, pod, stub):
        assert pod()[0] == 2
        assert pod("start")[0] == 2
        code, _, (line,) = run(LAUNCH / "tpu_pod.sh", "stop", TPU="pod", ZONE="")
        assert code != 0
        assert "ZONE: its zone" in line


class TestJobSet:
    @pytest.fixture
    def hosts(self):
        jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
        assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        (job,) = jobset["spec"]["replicatedJobs"]
        return job["template"]["spec"]

    def test_there_is_a_pod_for_each_host_of_the_slice(self, hosts):
        pod = hosts["template"]["spec"]
        selector = pod["nodeSelector"]
        (container,) = pod["containers"]
        rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert hosts["parallelism"] == hosts["completions"] == rows * columns // chips
        assert hosts["backoffLimit"] == 0  # a host alone is not started again
        assert pod["restartPolicy"] == "Never"
        assert pod["terminationGracePeriodSeconds"] >= 60
        (mounted,), (volume,) = container["volumeMounts"], pod["volumes"]
        assert mounted["name"] == volume["name"]

    @pytest.mark.parametrize(
        ("enat", "told", "code"),
        [("exit 0", False, 0), ("exit 3", False, 3),
         ('trap "exit 0" TERM; touch up; sleep 30 & wait', True, 75),  # saved, but not done
         ('trap "exit 4" TERM; touch up; sleep 30 & wait', True, 4)],
    )  # fmt: skip
    def test_its_command_passes_sigterm_on_and_says_whether_all_is_done(
        self, hosts, stub, tmp_path, enat, told, code
    ):
        (container,) = hosts["template"]["spec"]["containers"]
        path = stub("enat", f"[[ $1 == train && $3 == --workdir=/mnt/enat/run ]] || exit 9\n{enat}")
        command = [*container["command"], *container["args"]]
        with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PATH": path}) as process:
            while told and not (tmp_path / "up").exists():
                time.sleep(0.02)
            if told:
                process.terminate()
            assert process.wait(timeout=60) == code
