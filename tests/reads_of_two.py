"""Run by ``test_two_processes``: ``rto``, and what each process read of the reference goes to ``$READS/RANK.json``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rto.cli import end, main
from rto.preferences.cache import ReferenceCache

plain, read, caches = ReferenceCache.sums, [], []


def counted(cache: ReferenceCache, answers: Any, compute: Any) -> Any:
    def computed() -> Any:
        read[-1] = len(answers)
        return compute()

    caches[:] = [cache]
    read.append(0)
    return plain(cache, answers, computed)


ReferenceCache.sums = counted  # type: ignore[method-assign]
code = main(sys.argv[1:])
known = {key.hex(): value for key, value in caches[0].known.items()}
Path(os.environ["READS"], f"{os.environ['RANK']}.json").write_text(json.dumps({"read": read, "known": known}))
end(code)
