"""The benchmark's child process, without a process."""
from __future__ import annotations

import json

from tools.bench.turns import Refused
from tools.bench.worker import answers
from utils.cli import describe_error
from utils.errors import UserError


class InThisProcess:
    """Does what :class:`Worker` does without a process of its own."""

    def __init__(self, job: dict) -> None:
        self.requests: list[str] = []
        self.answers = answers(job, iter(lambda: self.requests.pop(0), None))
        self.about = self._answer()

    def ask(self, **request) -> dict:
        self.requests.append(json.dumps(request))
        return self._answer()

    def _answer(self) -> dict:
        try:
            return json.loads(json.dumps(next(self.answers)))
        except UserError as error:
            raise Refused(describe_error(error)) from None

    def close(self) -> None:
        self.answers.close()

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error) -> None:
        self.close()
