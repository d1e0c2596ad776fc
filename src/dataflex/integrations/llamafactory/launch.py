"""Launcher of a run in one process or several, with LLaMA-Factory's conventions and environment variables.

The variables are ``FORCE_TORCHRUN``, ``NNODES``, ``NODE_RANK``, ``NPROC_PER_NODE``, ``MASTER_ADDR``, ``MASTER_PORT``
and, for elastic jobs, ``RDZV_ID``, ``MIN_NNODES``, ``MAX_NNODES``, ``MAX_RESTARTS``. On a machine without an
accelerator the workers use gloo, and the launcher sets the variables that accelerate and DeepSpeed need for it.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from dataflex.config.processes import is_worker
from dataflex.trainer.stopping import Stopped

ERROR_FOLDER = "DATAFLEX_ERROR_FOLDER"
"""Environment variable that names the folder for the workers' error messages. The launcher prints each message once."""


def wants_many() -> bool:
    """Return whether LLaMA-Factory's launcher would start several processes on this machine."""
    from llamafactory.extras.misc import get_device_count, is_env_enabled, use_kt, use_ray

    return is_env_enabled("FORCE_TORCHRUN") or (get_device_count() > 1 and not use_ray() and not use_kt())


def run_many(arguments: list[str]) -> int:
    """Start ``dataflex`` with the arguments (such as ``["train", "run.yaml"]``) under torchrun.

    Returns:
        The exit status of the first worker that failed, or 0.

    Raises:
        Stopped: if a signal stopped the run. The workers have ended by then.
    """
    from llamafactory.extras.misc import find_available_port, get_device_count
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    processes = os.environ.get("NPROC_PER_NODE") or str(max(1, get_device_count()))
    port = os.environ.get("MASTER_PORT") or str(find_available_port())
    options = _rendezvous(os.environ.get("MASTER_ADDR", "127.0.0.1"), port)
    options += ["--nproc_per_node", processes, "-m", "dataflex", *arguments]
    _set_environment(int(processes) if processes.isdigit() else 1, accelerator=get_device_count() > 0)
    with tempfile.TemporaryDirectory(prefix="dataflex-") as folder:
        os.environ[ERROR_FOLDER] = folder
        _quieten_torchrun()
        try:
            torchrun(get_args_parser().parse_args(options))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            _print_errors(Path(folder), f"process {rank} ended with status {status}.")
            return status
        except SignalException as error:
            raise Stopped(error.sigval) from None
        finally:
            del os.environ[ERROR_FOLDER]
    return 0


def _rendezvous(address: str, port: str) -> list[str]:
    """Return torchrun's options for the nodes and their meeting point."""
    nodes = os.environ.get("NNODES", "1")
    rdzv_id = os.environ.get("RDZV_ID")
    if rdzv_id is None:
        node_rank = os.environ.get("NODE_RANK", "0")
        return ["--nnodes", nodes, "--node_rank", node_rank, "--master_addr", address, "--master_port", port]
    fewest, most = os.environ.get("MIN_NNODES"), os.environ.get("MAX_NNODES")
    elastic = f"{fewest}:{most}" if fewest and most else nodes
    options = ["--nnodes", elastic, "--rdzv-id", rdzv_id, "--rdzv-backend", "c10d"]
    return [*options, "--rdzv-endpoint", f"{address}:{port}", "--max-restarts", os.environ.get("MAX_RESTARTS", "0")]


def _set_environment(processes: int, accelerator: bool) -> None:
    """Set the environment variables that workers need and the user has not set."""
    bin_folder = str(Path(sys.executable).parent)
    if bin_folder not in os.environ.get("PATH", "").split(os.pathsep):
        # DeepSpeed compiles its operators with the `ninja` that is installed beside this Python.
        os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    if accelerator:
        if os.environ.get("OPTIM_TORCH", "1").lower() in ("1", "true", "y"):
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            os.environ.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, processes))))
    # Without this variable accelerate names the device cpu:<rank>, and torch.load cannot map a checkpoint to it.
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _quieten_torchrun() -> None:
    """Silence torchrun's log about workers that failed or were stopped, unless ``LOGLEVEL`` is set.

    DataFlex prints these messages itself.
    """
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def report_error(text: str) -> None:
    """Report an error once. A worker writes it to a file for the launcher, any other process prints it."""
    from dataflex.trainer import console

    console.end_bars()
    folder = os.environ.get(ERROR_FOLDER)
    if folder is None or not is_worker():
        print(text, file=sys.stderr)
        return
    (Path(folder) / f"{int(os.environ.get('RANK', '0')):06d}").write_text(text, encoding="utf-8")


def _print_errors(folder: Path, otherwise: str) -> None:
    """Print the workers' messages, each text once.

    Args:
        folder: folder of the messages.
        otherwise: message to print if there is none.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())] or [f"dataflex: {otherwise}"]
    print(file=sys.stderr)  # a worker's progress bar may have been left in the middle of a line
    for text in dict.fromkeys(texts):
        print(text, file=sys.stderr)
