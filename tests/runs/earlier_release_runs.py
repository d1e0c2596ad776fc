"""Runs of the earlier release's example files, with a tiny model, tiny data and few steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import yaml

import earlier_release
import tiny


@contextmanager
def judge() -> Iterator[str]:
    """Serve a model that rates texts by their length, and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rating = str(len(body["messages"][-1]["content"]) % 10)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": rating}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def add_earlier(workshop: Any, address: str) -> None:
    """Add a run of every example file.

    Args:
        workshop: Workshop that the runs are added to.
        address: Address of the judge.
    """
    folder = workshop.root.parent / "earlier"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "top_indices.npy", np.stack([rng.permutation(80) for _ in range(12)]))
    np.save(folder / "tsds_probs.npy", rng.dirichlet(np.ones(80)))
    found = earlier_release.shortened(earlier_release.components())
    params = {name: entry["params"] for name, entry in found["selectors"].items()}
    params["near"]["indices_path"] = str(folder / "top_indices.npy")
    params["tsds"]["probs_path"] = str(folder / "tsds_probs.npy")
    found["mixers"]["doremi"]["params"]["reference_model_path"] = str(workshop.model)
    service = {**earlier_release.BACKENDS["api"], "api_url": address, "api_key": None}
    params["nice"] |= {"reward_model_backend": "api", "reward_backend_params": {"api": service}, "max_new_tokens": 6}
    (folder / "components.yaml").write_text(yaml.safe_dump(found))
    experts = {"model_name_or_path": str(tiny.make_experts(folder / "experts")), "lora_target": "q_proj,v_proj"}
    shared = {"dataset": "alpha,beta", "eval_dataset": "held", "max_steps": -1, "num_train_epochs": 1.0}
    shared |= {"components_cfg_file": str(folder / "components.yaml")}
    for name, keys in earlier_release.FILES.items():
        model = experts if name == "mixers/dynamic_moe" else {}
        workshop.add(f"earlier-{name.replace('/', '-')}", **{**shared, **model, **earlier_release.shortened(keys)})
