"""The scalars of a run on Weights & Biases or trackio, beside TensorBoard."""
from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.extras import need
from utils.files import write_json

LOG = logging.getLogger("afdcd")
TRACKERS = ("wandb", "trackio")


class Tracker:
    """One run of a tracker. What goes wrong there is one warning: it is left out, and the training goes on.

    name: one of TRACKERS. title: what the run is called there. directory, stem: where ``<stem>_tracker.json`` keeps
    the id by which a resumed run continues the same one. config: {setting: value}. UserError when the tracker's package
    is missing.
    """

    def __init__(self, name: str, project: str, title: str, directory: Path, stem: str,
                 config: Mapping[str, Any]) -> None:
        self.name, self._run, package = name, None, need(name, name)
        with self._may_fail():
            run_id = _id(directory / f"{stem}_tracker.json", name)
            # trackio has no ids, and a run is that of its name
            more = {"name": title, "id": run_id, "dir": str(directory)} if name == "wandb" else \
                {"name": f"{title}-{run_id}"}
            self._run = package.init(project=project, config=dict(config), resume="allow", **more)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the scalars of a step."""
        with self._may_fail():
            if self._run is not None:
                self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is due, and end."""
        with self._may_fail():
            if self._run is not None:
                self._run.finish()

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: somebody else's code, and a network
            LOG.warning("--tracker %s: nothing more is sent (%s: %s); the run goes on", self.name, type(error).__name__,
                        " ".join(str(error).split()))
            self._run = None


def _id(path: Path, name: str) -> str:
    """The id of this run at a tracker, from its file, where a new one is written."""
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        write_json(path, ids)
    return ids[name]
