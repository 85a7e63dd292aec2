"""Commands one after the other in a process that has imported nothing heavy: what each said, imported and cost.

    echo '[["train", "model=vaee"], ["sample"]]' | python -m tests.light_process

reads them as JSON and writes as JSON a list of `{"code", "text", "imported", "cpu_seconds"}`, one for each command. It is
for commands that end before anything heavy is imported. The first of them also pays for the light imports.
"""

import contextlib
import importlib
import io
import json
import sys
import time
from typing import Any

HEAVY = {"torch", "lightning", "torchvision", "sklearn"}


def run(command: str, *arguments: str) -> dict[str, Any]:
    screen, code = io.StringIO(), 0
    start = time.process_time()
    sys.argv = [f"src/{command}.py", *arguments]
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            importlib.import_module(f"src.{command}").main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "")
    return {
        "code": code,
        "text": screen.getvalue(),
        "imported": sorted(HEAVY & set(sys.modules)),
        "cpu_seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    print(json.dumps([run(*line) for line in json.load(sys.stdin)]))
